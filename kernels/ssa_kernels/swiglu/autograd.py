"""Autograd of SwiGLU. Apart from api.py because it imports Triton, which a CPU machine may lack."""

import torch
from torch.autograd.function import once_differentiable

from .backward import swiglu_backward
from .forward import swiglu_forward


class SwiGLU(torch.autograd.Function):
    """x -> y. Saves x, which the projection's output is anyway."""

    @staticmethod
    def forward(ctx, x):
        """Runs the forward kernel; x is contiguous."""
        ctx.save_for_backward(x)
        return swiglu_forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        """Runs the backward kernel."""
        (x,) = ctx.saved_tensors
        return swiglu_backward(x, grad_y.contiguous())
