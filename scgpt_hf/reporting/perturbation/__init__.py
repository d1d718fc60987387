"""The report of a perturbation evaluation: its figures and its page."""
