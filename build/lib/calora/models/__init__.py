"""A transformers model, as calora sees it: its family, its parts, the inputs of its layers, and the task it is given."""
