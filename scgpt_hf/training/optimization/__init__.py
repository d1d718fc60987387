"""How weights are updated: which ones decay, Muon, the learning rate schedules' arguments, and averages of weights."""
