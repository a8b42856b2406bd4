"""Generated worlds that environments play in: a fact graph to search, small repositories with a bug."""
