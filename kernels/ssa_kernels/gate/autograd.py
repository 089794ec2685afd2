"""Autograd of the gate. Apart from api.py because it imports Triton, which a CPU machine may lack."""

import torch
from torch.autograd.function import once_differentiable

from .backward import gate_stream_backward
from .forward import gate_stream_forward


class Gate(torch.autograd.Function):
    """(o, gate_logits) -> out. Saves its inputs, of which the attention keeps o anyway."""

    @staticmethod
    def forward(ctx, o, gate_logits):
        """Runs the forward kernel; the tensors are contiguous."""
        ctx.save_for_backward(o, gate_logits)
        return gate_stream_forward(o, gate_logits)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        """Runs the backward kernel."""
        o, gate_logits = ctx.saved_tensors
        return gate_stream_backward(o, gate_logits, grad_out.contiguous())
