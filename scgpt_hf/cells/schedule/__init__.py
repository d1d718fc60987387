"""In which order a run trains on its cells."""
