"""DeepSpeed's checkpoints inside the project's: saved whole by every rank, resumed exactly, reshaped for other numbers of ranks.

A folder holds DeepSpeed's own files under one tag, its `zero_to_fp32.py`, and `deepspeed.json` with the stage and degrees that wrote it. The
file `latest`, by which DeepSpeed's tools find the tag, is written here once all ranks are done: DeepSpeed itself writes it too early. The folder
becomes visible when checkpoint.py renames it.

On the layout that wrote it a checkpoint is loaded as it is. For other degrees it becomes a *universal* one first, in a hidden folder beside it that
is removed again: DeepSpeed's converter puts every parameter, its fp32 weights and both moments together over data and tensor ranks, and
deepspeed_universal.py cuts them for the tensor ranks to come.
"""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist

from ssa_pretrain.config import Config
from ssa_pretrain.engine.deepspeed_setup import environment_of_a_converter
from ssa_pretrain.monitor.console import with_timestamps
from ssa_pretrain.parallel.agreement import on_first
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.weights import WeightsError

TAG = "deepspeed"
LAYOUT = "deepspeed.json"


def save(folder: Path, ds, config: Config, placement: Placement) -> None:
    """Write weights and optimizer into `folder`, which exists and is empty."""
    names = [name for name, _ in ds.module.named_parameters()]
    ds.save_checkpoint(str(folder), tag=TAG, client_state=universal_info(names), save_latest=False)
    dist.barrier()
    if placement.is_first:
        (folder / "latest").write_text(TAG)
        (folder / LAYOUT).write_text(json.dumps(layout(config, placement), indent=1))
    dist.barrier()


def load(folder: Path, ds, config: Config, placement: Placement) -> None:
    """Restore weights and optimizer into a fresh DeepSpeed engine.

    Raises:
        WeightsError: the checkpoint is of another stage and cannot be reshaped into this one's, or the converter failed; on every rank.
    """
    saved, wanted = read_layout(folder), layout(config, placement)
    _require_convertible(folder, saved, wanted)
    if saved == wanted or saved["zero_stage"] == 0:  # stage 0 shards nothing over dp
        _load_quietly(folder, ds)
        return
    universal = folder.with_name(f".{folder.name}.universal")

    def reshape() -> None:
        said = f"{folder} was written on {_words(saved)}: reshaping it for {_words(wanted)}"
        print(with_timestamps(said, config.logging.timestamps), flush=True)
        _convert(folder, universal, wanted)

    on_first(reshape, is_first=placement.is_first, errors=(WeightsError, OSError))
    # No barrier where a rank fails: the others would have left it, or wait in a collective that it is not in. The next start removes the folder.
    _load_universal(universal / f"tp_{placement.tp_rank:02d}", ds)
    dist.barrier()
    if placement.is_first:
        shutil.rmtree(universal)


def layout(config: Config, placement: Placement) -> dict[str, int]:
    """Return what must be the same for a checkpoint to load as it is."""
    return {"zero_stage": config.deepspeed.zero_stage, "tp": config.parallel.tp, "dp": placement.dp}


def read_layout(folder: Path) -> dict[str, int]:
    """Return the stage and degrees that wrote a checkpoint.

    Raises:
        WeightsError: DeepSpeed did not write it.
    """
    try:
        return json.loads((folder / LAYOUT).read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{folder} was not written by engine=deepspeed ({error}); "
            f"start a new run from its weights with checkpoint.init_from={folder}"
        ) from None


def universal_info(names: list[str]) -> dict:
    """Return how the parameters are cut over tensor ranks, as DeepSpeed's converter wants to be told.

    Norms are listed for averaging: equal on all tensor ranks, they come out unchanged, where `replicated` would insist on equal bits.
    """
    norms = [name for name in names if "norm" in name.rsplit(".", 2)[-2] or name.endswith("layer_norm_weight")]
    rows = [name for name in names if "linear_proj" in name or "linear_fc2" in name]
    pairs = [name for name in names if name.endswith("linear_fc1.weight")]

    def exactly(chosen: list[str]) -> list[str]:
        return ["^" + name.replace(".", r"\.") + "$" for name in chosen]

    return {
        "universal_checkpoint_info": {
            "universal_checkpoint_version": 0.2,
            "parameter_to_average_patterns": exactly(norms),
            "parameter_with_row_parallelism_patterns": exactly(rows),
            "parameter_with_2_sub_params_cat_dim_0": exactly(pairs),
        }
    }


def without_extra_state(model: torch.nn.Module) -> None:
    """Keep core's `_extra_state` entries, which are None here, out of the model's state dicts: DeepSpeed's converter breaks on them."""

    def drop(_module, state, _prefix, _metadata) -> None:
        for key in [key for key in state if key.endswith("_extra_state")]:
            del state[key]

    def forgive(_module, incompatible) -> None:
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if not key.endswith("_extra_state")]

    model.register_state_dict_post_hook(drop)
    model.register_load_state_dict_post_hook(forgive)


def _require_convertible(folder: Path, saved: dict[str, int], wanted: dict[str, int]) -> None:
    """Refuse what no universal checkpoint reaches."""
    start = f"or start a new run from its weights with checkpoint.init_from={folder}"
    stages = (saved["zero_stage"], wanted["zero_stage"])
    if stages[0] != stages[1] and not set(stages) <= {1, 2}:
        raise WeightsError(
            f"{folder} was written by ZeRO stage {stages[0]}, whose optimizer state stage {stages[1]} does not read; "
            f"set deepspeed.zero_stage={stages[0]}, {start}"
        )
    if stages[0] == 0 and saved["tp"] != wanted["tp"]:
        raise WeightsError(
            f"{folder} was written by ZeRO stage 0 at tp={saved['tp']}, and DeepSpeed reshapes stages 1 to 3 alone; "
            f"set parallel.tp={saved['tp']}, {start}"
        )


def _convert(folder: Path, universal: Path, wanted: dict[str, int]) -> None:
    """Write the universal checkpoint in a process of its own: DeepSpeed's converter starts workers, and this process may hold a GPU."""
    shutil.rmtree(universal, ignore_errors=True)
    command = [sys.executable, "-m", "ssa_pretrain.deepspeed_universal"]
    done = subprocess.run(
        [*command, str(folder / TAG), str(universal), str(wanted["tp"]), str(os.getpid())],
        env=environment_of_a_converter(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        raise WeightsError(
            f"{folder} could not be reshaped: DeepSpeed's converter was killed by signal {-done.returncode} (9: is memory short?); "
            "give the same command again"
        )
    if done.returncode:
        raise WeightsError(f"{folder} could not be reshaped; DeepSpeed's converter says:\n{done.stderr[-2000:]}")


def _load_universal(folder: Path, ds) -> None:
    settings = ds._config
    settings.load_universal_checkpoint = True
    try:
        _load_quietly(folder, ds)
    finally:
        settings.load_universal_checkpoint = False
    for (
        state
    ) in ds.basic_optimizer.state.values():  # counts are read on the CPU; a fused step wants them beside the weights
        if isinstance(state.get("step"), torch.Tensor) and "exp_avg" in state:
            state["step"] = state["step"].clone().to(state["exp_avg"].device)


def _load_quietly(folder: Path, ds) -> None:
    with redirect_stdout(io.StringIO()):  # it prints names of its own functions
        ds.load_checkpoint(str(folder), tag=TAG)


def _words(degrees: dict[str, int]) -> str:
    return f"ZeRO stage {degrees['zero_stage']}, tp {degrees['tp']}, dp {degrees['dp']}"
