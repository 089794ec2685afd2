"""The table of experiments: every experiment, and every layout for its length, is accepted, fits a GPU of 80 GB and uses every GPU."""

from itertools import product

import pytest

from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.planning.plan import make_plan

LENGTHS = ("8k", "32k")
# Methods differ in their group, layouts in their degrees: every experiment once, every layout once per length or more, and the larger SSA model, which
# needs the most memory, on the fewest GPUs.
GPUS = {
    "300m": {"ssa": 512, "full": 64, "moba": 1, "nsa": 8},
    "1b": {"ssa": 1, "full": 8, "moba": 512, "nsa": 64},
}


@pytest.mark.parametrize(("size", "length"), list(product(GPUS, LENGTHS)))
def test_experiment_and_layout_fit(size: str, length: str) -> None:
    for method, gpus in GPUS[size].items():
        name = f"{method}_{size}_{length}"
        words = [f"experiment={name}", f"layout=gpus_{gpus}_{length}", f"parallel.world_size={gpus}", "dry_run=true"]
        config = resolve_config("train", words, Machine(world_size=gpus, has_files=False))
        plan = make_plan(config, gpus)
        needed = plan.weight_bytes + plan.gradient_bytes + plan.optimizer_bytes + plan.activation_bytes
        assert (config.name, config.attention.method.value, config.model.name) == (name, method, f"llama_{size}")
        assert needed < 70 * 2**30, (name, gpus)
        assert plan.dp * plan.cp == gpus and plan.tokens_per_step == 3_145_728
        # Every layout of a length draws the same streams for the same rows, so a run can move between them.
        assert config.training.micro_batch_size == 1
        second = length == "32k"
        assert config.checkpoint.init_from == (f"outputs/{method}_{size}_8k" if second else "")
        assert config.model.rope_scaling.enabled == second and config.model.rope_scaling.factor == 4.0
        assert config.training.total_tokens == (5 if second else 100) * 10**9
        assert config.optim.lr == (1e-4 if second else 1e-3)
