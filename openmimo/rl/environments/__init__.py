"""Environments, one file each. `openmimo.rl.agents.environment` defines the interface."""
