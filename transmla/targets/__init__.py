"""What is written and which programs read it: the stock form, GGUF, padded folders, engines, fold and unfold."""
