"""A run's folder and process: its files, its lock, its signals, resuming, what it ran on."""
