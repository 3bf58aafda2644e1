"""`transmla plan` and `transmla convert`."""
