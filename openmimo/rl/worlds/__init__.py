"""Generated worlds for environments: a fact graph to search, and small repositories with a bug."""
