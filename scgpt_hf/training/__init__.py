"""How weights change: settings, the recipe from cells to a model, the trainer, and what a run leaves behind."""
