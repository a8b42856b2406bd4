"""The mathematics of post-training as pure functions of tensors, independent of model, engine and trainer."""
