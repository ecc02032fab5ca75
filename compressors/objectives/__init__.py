"""Training objectives, one file each, and the teacher that distillation compares with."""
