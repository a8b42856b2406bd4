"""The tasks; each file has a PLUGIN."""
