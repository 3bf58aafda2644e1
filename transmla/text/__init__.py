"""Text: where it comes from, how it is mixed, cut into windows or packed, and what a model writes itself."""
