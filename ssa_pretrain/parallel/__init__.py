"""Degrees, process groups, context parallelism, agreement between ranks and the CPU backend.

The only package that changes megatron-core's global state.
"""
