"""From data in a file to a trained adapter in a folder, on transformers' own Trainer."""
