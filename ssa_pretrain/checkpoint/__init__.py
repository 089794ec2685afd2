"""Checkpoints on disk: publishing and finding them, the facts a resume must agree on, their integrity, the weights' common format."""
