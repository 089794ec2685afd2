"""A run's records and views: metrics, the console, W&B, the environment, profiles."""
