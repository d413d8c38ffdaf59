"""What can be said of a model, and of what a recipe makes of it, before any weight is read."""
