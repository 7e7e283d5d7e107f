"""Weights that are trained from scratch: one paper, one file."""
