"""Data sources, one file each. The name of a source is the name of its file."""
