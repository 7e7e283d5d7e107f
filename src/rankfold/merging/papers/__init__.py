"""Rules of merging: one paper, one file."""
