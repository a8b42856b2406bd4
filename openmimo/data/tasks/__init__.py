"""Families of verifiable tasks, one per file. The file name is the family name."""
