"""Choosing blocks: api.py, reference.py, and the kernels in importance.py and topk.py, launched by launch.py."""  # noqa: A005 - only imported within its package
