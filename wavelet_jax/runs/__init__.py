"""A run's directory and what watches over a run: checkpoints, metrics, signals, throughput, profiles."""
