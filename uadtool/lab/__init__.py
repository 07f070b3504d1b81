"""Everything that needs torch: a module per step, and the folders that they join."""
