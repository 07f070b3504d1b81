"""uadtool: one anomaly-detection model for all product classes, from good images to an edge device."""

__version__ = "0.1.0"
