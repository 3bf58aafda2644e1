"""What is written, and who reads it: the stock form, GGUF, padded folders, engines, fold and unfold."""
