"""DeepSpeed's configuration, generated: one dictionary from a run's `Config`, and the rules of `deepspeed.extra`.

What a run's own sections decide is written out in full, so that the printed dictionary is the whole truth. `deepspeed.extra` adds keys that the
project has no word for (zero_optimization.stage3_prefetch_bucket_size, comms_logger, …); it may repeat a generated value but never change one.
Neither torch nor DeepSpeed is imported.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssa_pretrain.config import Config, PrecisionName
from ssa_pretrain.problems import Problem, join, show
from ssa_pretrain.suggestions import closest

# Sections of DeepSpeed's configuration that another section of ours decides, and the key that does.
DECIDED_ELSEWHERE = {
    "optimizer": "optim.lr and the rest of optim",
    "scheduler": "optim.schedule",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "bf16": "precision",
    "data_types": "precision.grad_reduce_in_fp32",
    "communication_data_type": "precision.grad_reduce_in_fp32",
    "tensorboard": "logging",
    "wandb": "logging=wandb",
    "csv_monitor": "logging",
    "comet": "logging",
    "tensor_parallel": "parallel.tp",
    "sequence_parallel_size": "parallel.sequence_parallel",
    "pipeline": "parallel.pp",
    "activation_checkpointing": "engine.recompute",
    "flops_profiler": "deepspeed.flops_profiler_step",
    "checkpoint": "checkpoint.interval and the rest of checkpoint",
    "elasticity": "parallel.world_size",
    "autotuning": "the plan (dry_run=true)",
    "curriculum_learning": "data",
    "data_efficiency": "data",
    "managed_gradient_accumulation": "training.global_batch_tokens",
}
PASSED_ON = (
    "zero_optimization",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "aio",
    "python_gc",
)


def ds_config(config: Config, dp: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a checked `Config` on `dp` data-parallel ranks."""
    merged = _generated(config, dp)
    for path, value in _leaves(config.deepspeed.extra):
        node = merged
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return merged


def extra_problems(config: Config) -> list[Problem]:
    """Returns what is wrong with `deepspeed.extra`: keys that another setting decides, that contradict one, or that do not exist."""
    generated = _generated(config, 1)
    found = []
    for path, value in _leaves(config.deepspeed.extra):
        key, top = "deepspeed.extra." + ".".join(path), path[0]
        known = _lookup(generated, path)
        if top in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            advice = "set training.global_batch_tokens and training.micro_batch_size"
            found.append(Problem(key, value, "is computed from the batch", advice))
        elif top in DECIDED_ELSEWHERE and (isinstance(known, _Missing) or known != value):
            found.append(Problem(key, value, "is decided elsewhere", f"set {DECIDED_ELSEWHERE[top]}"))
        elif not isinstance(known, _Missing) and known != value:
            advice = f"leave it out, or set {_OWN_KEY.get('.'.join(path), 'the setting that decides it')}"
            found.append(Problem(key, value, f"contradicts this run's {show(known)}", advice))
        elif isinstance(known, _Missing) and top not in (*generated, *PASSED_ON):
            near = closest(top, [*PASSED_ON, *DECIDED_ELSEWHERE], 1)
            advice = f"did you mean {near[0]}?" if near else f"it takes {join(PASSED_ON)}"
            found.append(Problem(key, value, "is no key that is passed on to DeepSpeed", advice))
    return found


_OWN_KEY = {
    "gradient_clipping": "optim.clip_grad",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.overlap_comm": "engine.overlap_grad_reduce",
    "zero_optimization.contiguous_gradients": "deepspeed.contiguous_gradients",
    "zero_optimization.reduce_bucket_size": "deepspeed.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size": "deepspeed.allgather_bucket_size",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
}


def _generated(config: Config, dp: int) -> dict[str, Any]:
    """The dictionary without `deepspeed.extra`."""
    choices, rows = config.deepspeed, max(1, config.training.micro_batch_size)
    steps = max(1, config.training.global_batch_tokens // (max(1, config.data.sequence_length) * rows * dp))
    low = config.precision.name is not PrecisionName.fp32
    grads = "fp32" if config.precision.grad_reduce_in_fp32 or not low else "bf16"
    zero: dict[str, Any] = {
        "stage": choices.zero_stage,
        "overlap_comm": config.engine.overlap_grad_reduce,
        "contiguous_gradients": choices.contiguous_gradients,
        "reduce_scatter": True,
        "reduce_bucket_size": choices.reduce_bucket_size,
        "allgather_bucket_size": choices.allgather_bucket_size,
    }
    if choices.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": rows * steps * dp,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": config.optim.clip_grad,
        "bf16": {"enabled": low},
        "data_types": {"grad_accum_dtype": grads},
        "communication_data_type": grads,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps on the CPU as well
        "flops_profiler": {
            "enabled": choices.flops_profiler_step > 0,
            "profile_step": choices.flops_profiler_step,
            "detailed": True,
            "output_file": str(Path(config.output_dir) / "flops_profile.txt"),
        },
        "tensorboard": {"enabled": False},
        "wandb": {"enabled": False},
        "csv_monitor": {"enabled": False},
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device at every step
        "steps_per_print": None,
    }


class _Missing:
    """No value; None is one."""


def _lookup(tree: Any, path: tuple[str, ...]) -> Any:
    """The value at a path, the subtree if the path ends early, or _Missing."""
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            return _Missing()
        tree = tree[name]
    return tree


def _leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value of a nested dictionary with its path."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, str(name)))
        else:
            yield (*path, str(name)), copy.deepcopy(value)
