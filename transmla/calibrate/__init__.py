"""Runs the source model, one layer at a time, and keeps what the conversion needs to know about it."""
