"""Teachers, and distillation from them (MOPD, paper section 4.4)."""
