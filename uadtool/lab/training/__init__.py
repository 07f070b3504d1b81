"""The training loop, its images, checkpoints, several processes, and synthetic anomalies."""
