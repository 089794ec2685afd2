"""megatron-core in a process of ours: its warnings and torch's, and an import that leaves out what training does not call.

Importing megatron-core 0.16 takes 4 s of CPU time in every rank. Half of it loads libraries for nothing. Its small functions are decorated with
`torch.compile`, which loads torch's compiler at the decorator and not at the first call; its text generation looks for W&B, which only the tracker's
process uses (monitor/tracking_process.py); its datasets look for boto3, to read from S3. `import_megatron_core` imports it with decorators that wait for
the first call, and without W&B and boto3. What is compiled, and with which options, stays the same. A process that imports megatron-core before is only
slower.
"""

import functools
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

QUIET = (
    "megatron.core.transformer.transformer_layer",  # "Unknown MLP type": ours
    "megatron.core.models.gpt.gpt_model",  # newer core has another class for it
    "megatron.core.distributed.distributed_data_parallel",  # newer core wants places in its buffers, and finds them itself
    "megatron.core.dist_checkpointing.strategies.common",  # newer core writes no common.pt; checkpoints have one, which every version reads
    "torch.utils.cpp_extension",  # where CUDA's compiler is and no GPU
)


def hide_library_warnings() -> None:
    """Hides warnings of libraries about optional packages and settings; the banner reports those that matter."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


def import_megatron_core() -> None:
    """Imports torch and megatron-core, as described above. Call it after the configuration has been checked."""
    import torch

    if "megatron.core" in sys.modules:
        return
    compile_now = torch.compile
    torch.compile = functools.partial(compile_at_first_call, compile_now)
    try:
        with _hidden("wandb"), _hidden("boto3"):
            import megatron.core.datasets.indexed_dataset  # noqa: F401
    finally:
        torch.compile = compile_now


def compile_at_first_call(compile_now: Callable, function: Callable | None = None, **options: Any) -> Callable:
    """Returns what `compile_now` returns for a function, made when it is first called. Without a function, returns a decorator.

    Args:
        compile_now: `torch.compile`.
        function: what to compile. Anything but a Python function is compiled at once.
        options: those of `torch.compile`.
    """
    if function is None:
        return lambda found: compile_at_first_call(compile_now, found, **options)
    if not inspect.isfunction(function):
        return compile_now(function, **options)

    @functools.cache
    def compiled() -> Callable:
        return compile_now(function, **options)

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        return compiled()(*arguments, **keywords)

    return call


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Makes imports of a module fail inside the context, unless it is imported already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = cast(ModuleType, None)
    try:
        yield
    finally:
        del sys.modules[name]
