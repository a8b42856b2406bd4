"""Data sources, one file each; a file's name is the source's name."""
