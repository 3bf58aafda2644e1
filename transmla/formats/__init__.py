"""Checkpoints that stock engines run: names, config and scaling of the written folder."""
