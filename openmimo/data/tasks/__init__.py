"""Families of verifiable tasks, one file each; a file's name is the family's name."""
