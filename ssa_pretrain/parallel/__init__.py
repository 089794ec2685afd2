"""Degrees, process groups, stream routing and the CPU backend: the only package that touches megatron-core's global state."""
