"""Post-training by the processes of `torchrun`: one owns the schedule, and all of them roll out and learn."""
