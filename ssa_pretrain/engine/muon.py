"""Muon over parameters that hold several matrices and are sharded over tensor ranks: torch's Muon, with each matrix orthogonalised whole.

    M <- mu M + (1 - mu) G          U = (1 - mu) G + mu M with Nesterov, else M
    for each matrix of U, whole over the tensor ranks:  O = NewtonSchulz(matrix)
    W <- (1 - lr decay) W - lr scale O

`torch.optim.Muon` holds groups, state and settings. Its step is replaced, because it treats a parameter as one matrix and rounds it to bf16. The arithmetic
is its own, so in bf16 a step is torch's on separate matrices, up to fp32 rounding. fp32 runs orthogonalise in fp32, where layouts agree.

Tensor ranks gather each parameter's U, in the dtype of the orthogonalisation, and all compute the same O; each keeps its part. The work is small beside a
step's (docs/optimizers.md), and the momentum is sharded like the weights.

Source: https://kellerjordan.github.io/posts/muon; torch/optim/_muon.py; the scale of the update: Moonlight, arXiv 2502.16982.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_pretrain.config import MuonScale, OptimConfig
from ssa_pretrain.model import sharding
from ssa_pretrain.model.matrices import join, split


class SplitMuon(torch.optim.Muon):
    """Muon whose groups name the matrices that their parameters hold.

    Attributes:
        MOMENTUM: name of the momentum in the state.
        found_inf: scalar on the device; a step while it is 1 changes no weight and no momentum. None: every step counts.

    Args:
        groups: torch's parameter groups, each with `kind`, the end of its parameters' names, and `rows`, of each matrix (model/matrices.py).
        optim: the settings.
        dtype: of the orthogonalisation, bf16 or fp32.
        tensor_ranks: the ranks that share the parameters.
    """

    MOMENTUM = "momentum_buffer"

    def __init__(
        self,
        groups: list[dict[str, Any]],
        optim: OptimConfig,
        *,
        dtype: torch.dtype,
        tensor_ranks: dist.ProcessGroup | None = None,
    ) -> None:
        muon = optim.muon
        super().__init__(
            groups,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=muon.momentum,
            nesterov=muon.nesterov,
            ns_steps=muon.ns_steps,
            adjust_lr_fn=muon.scale.value,
        )
        self.found_inf: Tensor | None = None
        self._dtype, self._tensor_ranks = dtype, tensor_ranks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates every parameter that has a gradient; all tensor ranks call it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def init_states(self) -> None:
        """Gives every parameter the momentum of step 0 that has none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.MOMENTUM not in self.state[parameter]:
                    self.state[parameter][self.MOMENTUM] = torch.zeros_like(parameter)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Takes one parameter's step."""
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if self.MOMENTUM not in state:
            state[self.MOMENTUM] = torch.zeros_like(parameter)
        momentum, weight, lr = state[self.MOMENTUM], 1 - group["momentum"], group["lr"]
        if self.found_inf is not None:  # factors of 0 leave every bit, once the gradient is finite
            skip, taken = self.found_inf.bool(), 1.0 - self.found_inf.float()
            grad.masked_fill_(skip, 0.0)
            weight, lr = weight * taken, lr * taken
        momentum.lerp_(grad, weight)
        update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = self._orthogonal(update.to(self._dtype), group, update.dtype)
        parameter.mul_(1 - lr * group["weight_decay"])
        if self.found_inf is None:
            parameter.add_(update, alpha=-lr)
        else:
            parameter.sub_(update * lr)

    def _orthogonal(self, narrow: Tensor, group: dict[str, Any], dtype: torch.dtype) -> Tensor:
        """Returns, in `dtype`, this tensor rank's part of the scaled orthogonal factors of an update's matrices."""
        ranks, kind = self._tensor_ranks, group["kind"]
        tp = 1 if ranks is None else dist.get_world_size(ranks)
        whole = narrow
        if ranks is not None and tp > 1:
            parts = [torch.empty_like(narrow) for _ in range(tp)]
            dist.all_gather(parts, narrow.contiguous(), group=ranks)
            whole = sharding.join(kind, parts)
        settings = (group["ns_coefficients"], group["ns_steps"], group["eps"])
        found = []
        for matrix in split(whole, group["rows"]):
            scale = update_scale(matrix.shape, MuonScale(group["adjust_lr_fn"]))
            found.append(orthogonalise(matrix, *settings).to(dtype) * scale)
        if tp == 1:
            return join(found, group["rows"])
        return sharding.part(kind, join(found, group["rows"]), tp, dist.get_rank(ranks))


def orthogonalise(matrix: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Returns U V' of a matrix U S V', up to singular values between 0.7 and 1.2: the quintic Newton-Schulz iteration, in the matrix's dtype.

    Args:
        matrix: [rows, columns].
        coefficients: a, b, c of x <- a x + b x x' x + c (x x')^2 x.
        steps: iterations.
        eps: smallest norm that is divided by.
    """
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def update_scale(shape: Sequence[int], scale: MuonScale) -> float:
    """Returns the size of a matrix's update, in units of the learning rate."""
    rows, columns = shape
    if scale is MuonScale.original:
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
