"""A trained scorer of blocks: its choice, its loss and the attention mass by block. api.py, loss.py, reference.py; kernels: mass_triton.py, gradient_triton.py."""

from .api import block_mass, choose_by_index, index_loss

__all__ = ["block_mass", "choose_by_index", "index_loss"]
