"""JSON schemas of all records."""
