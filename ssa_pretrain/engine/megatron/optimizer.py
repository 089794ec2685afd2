"""AdamW through megatron-core, with the gradient norm, the clipping and the decision to skip a step on the device.

Core's own step reads the norm on the host to decide whether to clip, and there it waits for the whole backward. Here the gradients are multiplied
by min(1, clip / norm), a scalar on the device. A norm that is not finite makes the step a no-op (skipping.py).
"""

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from ssa_pretrain.config import Config, PrecisionName
from ssa_pretrain.engine.megatron.skipping import SkipFlag
from ssa_pretrain.model.matrices import HIDDEN, is_hidden
from ssa_pretrain.model.mup import multipliers

NORM_EPSILON = 1.0e-6  # the same as core's


class DeviceClippedOptimizer(ChainedOptimizer):
    """Core's chained optimizer, with a step that does not wait for the device and changes nothing if the gradient norm is not finite.

    Args:
        optimizers: core's optimizers of a rank's model chunks.
        skips: whether such steps are skipped on a GPU too; else the caller ends the run after one, and the update is the library's own.
    """

    def __init__(self, optimizers: list[MegatronOptimizer], *, skips: bool) -> None:
        super().__init__(optimizers)
        device = training_device()
        on_gpu = device.type == "cuda" and skips
        self._flags = [SkipFlag(o.optimizer, device) for o in optimizers if on_gpu and o.optimizer is not None]

    @torch.no_grad()
    def step(self) -> tuple[bool, Tensor, None]:
        """Returns (whether the step was queued, the global gradient norm before clipping, fp32 on the device, None)."""
        found_inf = self.prepare_grads()
        assert not found_inf  # only fp16 scales losses, and fp16 is not supported
        grads = [g for optimizer in self.chained_optimizers for g in _gradients(optimizer)]
        norm = _norm(grads, self.get_grad_stats_parallel_group())
        if self._flags:
            for flag in self._flags:
                flag.set(~norm.isfinite())
        elif not norm.is_cuda and not bool(norm.isfinite()):  # on a CPU the norm is there
            return False, norm, None
        if self.config.clip_grad > 0.0:
            factor = (self.config.clip_grad / (norm + NORM_EPSILON)).clamp(max=1.0)
            for optimizer in self.chained_optimizers:
                if own := [p.grad for p in optimizer.get_parameters() if p.grad is not None]:
                    torch._foreach_mul_(own, factor)  # pyright: ignore[reportPrivateImportUsage]
        return self.step_with_ready_grads(), norm, None

    def prepare_skipping(self) -> None:
        """Restores what skipping needs after optimizer states were loaded."""
        for flag in self._flags:
            flag.prepare()

    def count_skipped_steps(self) -> None:
        """Takes skipped steps out of Adam's step counts, before they are saved or replaced. Waits for the device."""
        for flag in self._flags:
            flag.settle()


def _gradients(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Returns the gradients that count for the norm, each on one rank of those that hold it; core renamed the method after 0.16."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()


def _norm(grads: list[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Returns the norm over all ranks of a group; `grads` are those that only this rank counts."""
    norms = torch._foreach_norm(grads) if grads else [torch.zeros((), device=training_device())]  # pyright: ignore[reportPrivateImportUsage]
    total = torch.stack(list(norms)).float().square().sum()
    dist.all_reduce(total, group=group)
    return total.sqrt()


def training_device() -> torch.device:
    """Returns the device that this rank trains on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def core_settings(config: Config, *, distributed: bool) -> OptimizerConfig:
    """Returns core's settings of AdamW; `distributed` is whether core's distributed optimizer shards it."""
    low, optim = config.precision.name is not PrecisionName.fp32, config.optim
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=low,
        params_dtype=torch.bfloat16 if low else torch.float32,
        use_distributed_optimizer=distributed,
        overlap_param_gather=config.engine.overlap_param_gather,
    )


def build_adamw(config: Config, chunks: list[DistributedDataParallel]) -> DeviceClippedOptimizer:
    """Returns AdamW over a rank's model chunks: Transformer Engine's fused one if it is installed, otherwise torch's."""
    settings = core_settings(config, distributed=config.engine.distributed_optimizer)
    built = get_megatron_optimizer(settings, chunks, config_overrides=_mup_overrides(config, settings))
    return DeviceClippedOptimizer(built.chained_optimizers, skips=config.training.max_skipped_steps > 0)


def _mup_overrides(config: Config, settings: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride] | None:
    """Returns core's overrides with muP's factors for the layers' matrices; None if they are 1: core's own."""
    lr, decay = multipliers(config)(HIDDEN[0], 2)
    if lr == decay == 1.0:
        return None
    key = ParamKey(with_name_predicate=ParamWithNamePredicate(name="hidden", fn=lambda _, name: is_hidden(name)))
    factors = ParamGroupOverride(lr_mult=lr, wd_mult=decay)  # pyright: ignore[reportCallIssue]
    return get_standard_config_overrides(settings) | {key: factors}
