"""Images in, records out: predictions, metrics, thresholds, pictures."""
