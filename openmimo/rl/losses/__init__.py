"""The mathematics of post-training: pure functions of tensors, with no model, engine or trainer in sight."""
