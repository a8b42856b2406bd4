"""Teachers and what they contribute to a batch (MOPD, paper section 4.4)."""
