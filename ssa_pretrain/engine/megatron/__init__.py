"""The megatron-core engine: core's data parallelism, pipeline schedules, optimizer and sharded checkpoints."""
