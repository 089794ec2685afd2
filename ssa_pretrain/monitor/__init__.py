"""What a run records and shows of itself: metrics, the console, W&B, the environment, profiles."""
