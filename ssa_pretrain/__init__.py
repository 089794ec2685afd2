"""Pretraining of language models with Sparse Sparse Attention (SSA, arXiv 2511.20102)."""

__version__ = "0.1.0"
