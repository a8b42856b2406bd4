"""Environments, one file each; `openmimo.rl.environment` says what one is."""
