"""The gate on both streams and the loss that aligns them: api.py, reference.py and the Triton kernels."""
