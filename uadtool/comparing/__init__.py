"""Results of several models: read, merged, set against the first one, judged by gates, shown."""
