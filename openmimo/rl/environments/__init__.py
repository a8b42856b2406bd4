"""Environments, one file each; `openmimo.rl.agents.environment` says what one is."""
