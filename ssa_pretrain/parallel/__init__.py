"""Degrees, process groups, context parallelism, agreement between ranks and the CPU backend: the only package that changes megatron-core's global state."""
