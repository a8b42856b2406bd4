"""Rollout backends, one file each, that exports `PLUGIN`, a RolloutBackend. `RlConfig.rollouts` names one."""
