"""Layers whose weights stay packed, and how any layer goes to disk and back."""
