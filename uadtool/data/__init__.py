"""From what the user points at to samples and pixels."""
