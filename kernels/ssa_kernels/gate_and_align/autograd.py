"""Autograd of the fused gate and alignment. Apart from api.py because it imports Triton, which a CPU machine may lack."""

import torch
from torch.autograd.function import once_differentiable

from .backward import gate_backward
from .forward import gate_forward


class GateAndAlign(torch.autograd.Function):
    """(o_full, o_sparse, gate_logits, main, weights) -> (out, loss). Saves its inputs; the backward recomputes the rest."""

    @staticmethod
    def forward(ctx, o_full, o_sparse, gate_logits, main, weights):
        """Runs the forward kernel; the tensors are contiguous."""
        out, loss, _ = gate_forward(o_full, o_sparse, gate_logits, main, weights)
        on_device = isinstance(main, torch.Tensor)
        ctx.save_for_backward(o_full, o_sparse, gate_logits, main if on_device else None)
        ctx.main_name, ctx.weights = None if on_device else main, weights
        return out, loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_loss):
        """Runs the backward kernel; its deltas have no reader here."""
        o_full, o_sparse, gate_logits, main = ctx.saved_tensors
        main = ctx.main_name if main is None else main
        do_full, do_sparse, _, _, grad_logits = gate_backward(
            o_full, o_sparse, gate_logits, grad_out.contiguous(), grad_loss, main, ctx.weights
        )
        return do_full, do_sparse, grad_logits, None, None
