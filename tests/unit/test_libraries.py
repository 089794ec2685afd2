"""megatron-core is imported only where it is needed, and without torch's compiler, W&B and boto3; what it would compile is compiled at the first call."""

import subprocess
import sys

from ssa_pretrain.libraries import compile_at_first_call
from support.processes import environment

NOT_LOADED = ("torch._dynamo", "torch._inductor.compile_fx", "wandb", "boto3")
IMPORT = f"""
import sys, torch
from ssa_pretrain.libraries import hide_library_warnings, import_megatron_core
compile_now = torch.compile
hide_library_warnings()
import_megatron_core()
import ssa_pretrain.trainer, ssa_pretrain.engine.megatron.engine
assert torch.compile is compile_now
print([name for name in {NOT_LOADED} if name in sys.modules])
import boto3, wandb
"""


def test_a_rank_loads_neither_the_compiler_nor_clients():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_deepspeeds_converter_loads_no_megatron_core():
    """A resume on other degrees waits for this process, and megatron-core takes longer to import than a small checkpoint to convert."""
    program = "import sys, ssa_pretrain.engine.deepspeed.universal; print('megatron.core' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_function_is_compiled_once_and_when_it_is_called():
    compiled = []

    def compile_now(function, **options):
        compiled.append((function, options))
        return lambda *arguments, **keywords: ("compiled", function(*arguments, **keywords))

    def add(a: int, b: int) -> int:
        """Returns the sum."""
        return a + b

    for lazy, options in (
        (compile_at_first_call(compile_now, add), {}),
        (compile_at_first_call(compile_now, dynamic=True)(add), {"dynamic": True}),
    ):
        compiled.clear()
        assert (lazy.__name__, lazy.__doc__) == ("add", "Returns the sum.")
        assert compiled == []
        assert lazy(1, b=2) == lazy(1, 2) == ("compiled", 3)
        assert compiled == [(add, options)]


def test_what_is_not_a_function_is_compiled_at_once():
    assert compile_at_first_call(lambda found, **options: (found, options), int, mode="x") == (int, {"mode": "x"})
