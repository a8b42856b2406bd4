"""The policy update: packing, annotation and the trainer."""
