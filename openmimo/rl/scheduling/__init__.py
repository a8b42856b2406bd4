"""The data scheduler: which problems are rolled out, which samples make a batch, and its log."""
