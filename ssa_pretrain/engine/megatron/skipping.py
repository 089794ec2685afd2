"""Skips an optimizer step on the device: a flag in its memory makes the update a no-op, and the host does not read it.

The flag is set where the gradient norm is not finite. All ranks have the same norm, so all of them skip the same steps. On a skipped step weights and
moments keep their bits, and the step does not count in Adam's bias corrections. How the flag reaches the update depends on the optimizer:

* Transformer Engine's FusedAdam has kernels that return at once if a flag is set: those it uses under `capturable=True`. They read the learning
  rate and the step from the device. `capturable` itself is not usable here: it makes the group's learning rate and step tensors, which core's
  checkpoints do not take, and it resets the flag in each step. So FusedAdam is left as it is, and only its kernel is exchanged. The host keeps
  counting steps, the device counts those it skipped, and the difference is the step of the bias corrections. `settle` moves the device's count
  into the host's. It reads the device, so it is called where the host waits anyway, before a checkpoint.
* torch's AdamW takes the flag as `found_inf` if it is fused. It is set to be fused on a GPU.
* SplitMuon (engine/muon.py) takes it in the same way and has no count.
* On a CPU the caller does not take the step (optimizer.py).

Source: transformer_engine/common/multi_tensor/adam.cu (AdamCapturableFunctor), torch/optim/adam.py (_fused_adam).
"""

from typing import Any

import torch
from torch import Tensor

from ssa_pretrain.engine.muon import SplitMuon


class SkipFlag:
    """The flag of one optimizer.

    Args:
        optimizer: Transformer Engine's FusedAdam, torch's AdamW or SplitMuon, over fp32 weights on one device.
        device: of the weights.

    Raises:
        TypeError: another optimizer.
    """

    def __init__(self, optimizer: Any, device: torch.device) -> None:
        self._optimizer = optimizer
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        self._skipped = torch.zeros(1, dtype=torch.int32, device=device)  # since the host last counted
        self._one = torch.ones(1, dtype=torch.float32, device=device)
        self._is_torch = isinstance(optimizer, torch.optim.AdamW | SplitMuon)
        if not self._is_torch:
            if (
                not hasattr(optimizer, "multi_tensor_adam_capturable")
                or optimizer.capturable
                or optimizer.master_weights
            ):
                raise TypeError(f"{type(optimizer).__name__} has no update that a flag on the device can skip")
            optimizer.multi_tensor_adam = self._update
        self.prepare()

    def prepare(self) -> None:
        """Makes torch's AdamW fused and moves its step counts to the GPU; call it again after loading, which restores the checkpoint's groups."""
        if not self._is_torch:
            return
        self._optimizer.found_inf = torch.zeros((), dtype=torch.float32, device=self._flag.device)
        if isinstance(self._optimizer, SplitMuon):
            return
        for group in self._optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
        for state in self._optimizer.state.values():
            state["step"] = state["step"].to(self._flag.device, torch.float32)

    def set(self, skip: Tensor) -> None:
        """Sets the flag for the next step; call it once before each.

        Args:
            skip: bool scalar on the device.
        """
        self._skipped += self._flag  # of the step before
        self._flag.copy_(skip)
        if self._is_torch:
            self._optimizer.found_inf.copy_(skip)

    def settle(self) -> None:
        """Takes the skipped steps out of the optimizer's step count. Waits for the device."""
        self._skipped += self._flag
        self._flag.zero_()
        skipped = int(self._skipped)
        self._skipped.zero_()
        if self._is_torch:
            return  # it takes them out itself, on the device
        for group in self._optimizer.param_groups:
            if "step" in group:
                group["step"] -= skipped

    def _update(
        self,
        chunk_size: int,
        _unused_flag: Tensor,
        tensors: list[list[Tensor]],
        learning_rate: float,
        beta1: float,
        beta2: float,
        epsilon: float,
        step: int,
        *mode_correction_decay: Any,
    ) -> None:
        """Replaces FusedAdam's `multi_tensor_adam`: the same update by the kernel that reads the flag, with rate and step on the device."""
        device = self._flag.device
        rate = torch.full((), learning_rate, dtype=torch.float32, device=device)
        taken = torch.full((1,), step, dtype=torch.int32, device=device) - self._skipped
        self._optimizer.multi_tensor_adam_capturable(
            chunk_size, self._flag, tensors, rate, beta1, beta2, epsilon, taken, *mode_correction_decay, self._one
        )
