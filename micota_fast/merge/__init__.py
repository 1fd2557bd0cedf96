"""Model merging: mergekit's configuration files, reproducible masks, one tensor in memory at a time."""
