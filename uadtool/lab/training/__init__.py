"""Training one model for all classes: the loop, its images, checkpoints, several processes."""
