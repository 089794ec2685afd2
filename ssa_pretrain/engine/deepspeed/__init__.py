"""The DeepSpeed engine: ZeRO 0 to 3, DeepSpeed's own checkpoints, and reshaping them for other degrees."""
