"""Methods of compression: one paper, one file."""
