"""DeepSpeed's checkpoints inside the project's. Every rank saves its part, a resume is exact, and other numbers of ranks need reshaping.

A folder holds DeepSpeed's own files under one tag, its `zero_to_fp32.py`, and `deepspeed.json` with the stage and degrees that wrote it. DeepSpeed's
tools find the tag through the file `latest`. It is written here once all ranks are done; DeepSpeed would write it too early. The folder becomes
visible when checkpoint/publish.py renames it.

On the layout that wrote it, a checkpoint is loaded directly. For other degrees it is first converted to a *universal* checkpoint in a hidden folder
of the run that loads it, which is removed afterwards. The checkpoint's own folder is only read, so several branches may load it at once. DeepSpeed's
converter joins every parameter, its fp32 weights and both moments over data and tensor ranks, and universal.py cuts them for the new tensor ranks.
"""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ssa_pretrain.checkpoint.staging import HostCopies
from ssa_pretrain.checkpoint.unpickling import restricted
from ssa_pretrain.checkpoint.weights import WeightsError
from ssa_pretrain.config import Config
from ssa_pretrain.engine.deepspeed import snapshot
from ssa_pretrain.engine.deepspeed.setup import converter_environment
from ssa_pretrain.errors import ExitCode
from ssa_pretrain.model.sharding import is_norm, is_paired, is_row_parallel
from ssa_pretrain.monitor.console import with_timestamps
from ssa_pretrain.parallel.agreement import Attempts, on_rank_0
from ssa_pretrain.parallel.state import Placement

TAG = "deepspeed"
LAYOUT = "deepspeed.json"


def save(folder: Path, ds, config: Config, placement: Placement) -> None:
    """Writes weights and optimizer into an existing, empty folder.

    Raises:
        AgreedFailure: on every rank, if any rank could not write.
    """
    parts = Attempts()
    with snapshot.deferring(ds, parts):
        ds.save_checkpoint(str(folder), tag=TAG, client_state=_client_state(ds), save_latest=False)
    parts.agree()
    if placement.is_rank_0:
        parts.run(lambda: snapshot.write_notes(folder, _notes(config, placement)))
    parts.agree()


def copy_state(
    ds, copies: HostCopies, config: Config, placement: Placement
) -> Callable[[Path, dist.ProcessGroup], None]:
    """Copies weights and optimizer to host memory. Returns the function that writes what `save` writes, for a thread of every rank."""
    return snapshot.take(ds, copies, tag=TAG, client_state=_client_state(ds), notes=_notes(config, placement))


def load(folder: Path, ds, config: Config, placement: Placement) -> None:
    """Restores weights and optimizer into a DeepSpeed engine that has not been used.

    Raises:
        WeightsError: on every rank, if the checkpoint's stage cannot be reshaped into this one, or the converter failed.
        UnsafePickle: a file names a global that `save` never writes.
    """
    saved, wanted = read_layout(folder), layout(config, placement)
    _require_convertible(folder, saved, wanted)
    if saved == wanted or saved["zero_stage"] == 0:  # stage 0 shards nothing over dp
        _load_quietly(folder, ds)
        return
    universal = Path(config.output_dir) / f".{folder.name}.universal"

    def reshape() -> None:
        line = f"{folder} was written on {_describe(saved)}: reshaping it for {_describe(wanted)}"
        print(with_timestamps(line, config.logging.timestamps), flush=True)
        _convert(folder, universal, wanted)

    on_rank_0(reshape, is_rank_0=placement.is_rank_0, errors=(WeightsError, OSError))
    # If a rank fails here, there is no barrier: the others may wait in a collective that it is not in. The next start removes the folder.
    _load_universal(universal / f"tp_{placement.tp_rank:02d}", ds)
    dist.barrier()
    if placement.is_rank_0:
        shutil.rmtree(universal)


def layout(config: Config, placement: Placement) -> dict[str, int]:
    """Returns the layout. A checkpoint loads directly only if its layout is equal."""
    return {"zero_stage": config.deepspeed.zero_stage, "tp": config.parallel.tp, "dp": placement.dp}


def read_layout(folder: Path) -> dict[str, int]:
    """Returns the stage and degrees that wrote a checkpoint.

    Raises:
        WeightsError: the checkpoint is not DeepSpeed's.
    """
    try:
        return json.loads((folder / LAYOUT).read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{folder} was not written by engine=deepspeed ({error}); "
            f"start a new run from its weights with checkpoint.init_from={folder}"
        ) from None


def universal_info(names: list[str]) -> dict:
    """Returns how the parameters are cut over tensor ranks, in the form that DeepSpeed's converter reads.

    Norms are listed for averaging: they are equal on all tensor ranks and come out unchanged. `replicated` would require equal bits.
    """

    def patterns(matches: Callable[[str], bool]) -> list[str]:
        return ["^" + name.replace(".", r"\.") + "$" for name in names if matches(name)]

    return {
        "universal_checkpoint_info": {
            "universal_checkpoint_version": 0.2,
            "parameter_to_average_patterns": patterns(is_norm),
            "parameter_with_row_parallelism_patterns": patterns(is_row_parallel),
            "parameter_with_2_sub_params_cat_dim_0": patterns(is_paired),
        }
    }


def without_extra_state(model: torch.nn.Module) -> None:
    """Removes core's `_extra_state` entries, which are None here, from the model's state dicts: DeepSpeed's converter fails on them."""

    def drop(_module, state, _prefix, _metadata) -> None:
        for key in [key for key in state if key.endswith("_extra_state")]:
            del state[key]

    def ignore_missing(_module, incompatible) -> None:
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if not key.endswith("_extra_state")]

    model.register_state_dict_post_hook(drop)
    model.register_load_state_dict_post_hook(ignore_missing)


def _notes(config: Config, placement: Placement) -> dict[str, Any]:
    """Returns the further files of a checkpoint, by name."""
    return {"latest": TAG, LAYOUT: layout(config, placement)}


def _client_state(ds) -> dict:
    return universal_info([name for name, _ in ds.module.named_parameters()])


def _require_convertible(folder: Path, saved: dict[str, int], wanted: dict[str, int]) -> None:
    """Raises WeightsError if no universal checkpoint leads from one layout to the other."""
    start = f"or start a new run from its weights with checkpoint.init_from={folder}"
    stages = (saved["zero_stage"], wanted["zero_stage"])
    if stages[0] != stages[1] and not set(stages) <= {1, 2}:
        raise WeightsError(
            f"{folder} was written by ZeRO stage {stages[0]}, whose optimizer state stage {stages[1]} does not read; "
            f"set deepspeed.zero_stage={stages[0]}, {start}"
        )
    if stages[0] == 0 and saved["tp"] != wanted["tp"]:
        raise WeightsError(
            f"{folder} was written by ZeRO stage 0 at tp={saved['tp']}, and DeepSpeed reshapes only stages 1 to 3; "
            f"set parallel.tp={saved['tp']}, {start}"
        )


def _convert(folder: Path, universal: Path, wanted: dict[str, int]) -> None:
    """Writes the universal checkpoint in a separate process: DeepSpeed's converter starts workers, and this process may use a GPU."""
    shutil.rmtree(universal, ignore_errors=True)
    command = [sys.executable, "-m", "ssa_pretrain.engine.deepspeed.universal"]
    done = subprocess.run(
        [*command, str(folder / TAG), str(universal), str(wanted["tp"]), str(os.getpid())],
        env=converter_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        raise WeightsError(
            f"{folder} could not be reshaped: DeepSpeed's converter was killed by signal {-done.returncode} (9: is memory short?); "
            "run the same command again"
        )
    if done.returncode == ExitCode.CHECKPOINT:
        raise WeightsError(done.stderr.strip().rpartition("\n")[2].partition(": ")[2])
    if done.returncode:
        raise WeightsError(f"{folder} could not be reshaped; DeepSpeed's converter failed:\n{done.stderr[-2000:]}")


def _load_universal(folder: Path, ds) -> None:
    """Loads one tensor rank's part of a universal checkpoint."""
    settings = ds._config
    settings.load_universal_checkpoint = True
    try:
        _load_quietly(folder, ds)
    finally:
        settings.load_universal_checkpoint = False
    # Step counts are loaded on the CPU; a fused optimizer needs them on the device of the weights.
    for state in ds.basic_optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor) and "exp_avg" in state:
            state["step"] = state["step"].clone().to(state["exp_avg"].device)


def _load_quietly(folder: Path, ds) -> None:
    with restricted(folder), redirect_stdout(io.StringIO()):  # it prints the names of its own functions
        ds.load_checkpoint(str(folder), tag=TAG)


def _describe(degrees: dict[str, int]) -> str:
    return f"ZeRO stage {degrees['zero_stage']}, tp {degrees['tp']}, dp {degrees['dp']}"
