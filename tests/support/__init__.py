"""What tests share: judging errors, small datasets and models, processes, stand-in servers, and the kernels' oracle.

Tests import it as `support`: pytest's `pythonpath` holds the folder above, and `processes.environment` passes it to child processes.
"""
