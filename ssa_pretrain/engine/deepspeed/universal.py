"""Reshapes a DeepSpeed checkpoint: converts it to DeepSpeed's universal form, then cuts that for a number of tensor ranks.

    python -m ssa_pretrain.engine.deepspeed.universal CHECKPOINT/deepspeed OUT TP [PARENT]

OUT then holds a folder `tp_NN` per tensor rank, which DeepSpeed loads as the universal checkpoint of a model that is that rank's part. DeepSpeed
cannot cut by itself here: under ZeRO-3 it knows only AutoTP's models. No GPU is needed. A resume on other degrees runs this command and passes
its own process id as PARENT; the converter and its workers end when that process does. Without PARENT the checkpoint's sha256 are compared first; a
resume has done that. Every unpickling is restricted (checkpoint/unpickling.py), in the converter's forked workers too.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch

from ssa_pretrain.checkpoint.integrity import find_damage
from ssa_pretrain.checkpoint.unpickling import restricted
from ssa_pretrain.errors import CheckpointError
from ssa_pretrain.model.sharding import part, whole_shape
from ssa_pretrain.parallel.parent import end_forks_with_this_process, end_with_parent
from ssa_pretrain.process import command

TAG = "deepspeed"
STATES = ("fp32", "exp_avg", "exp_avg_sq")


def main() -> None:
    """Checks, converts, then cuts.

    Raises:
        CheckpointError: the checkpoint is damaged, or holds a pickle that is not one of DeepSpeed's.
    """
    source, out, tp = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    if len(sys.argv) > 4:
        end_with_parent(int(sys.argv[4]))
        end_forks_with_this_process()
    elif damage := find_damage(source.parent):
        raise CheckpointError(f"{source.parent} is damaged ({damage}); name an intact checkpoint")
    universal = out / "whole"
    convert(source, universal)
    for rank in range(tp):
        cut(universal, out / f"tp_{rank:02d}" / TAG, tp, rank)
    shutil.rmtree(universal)


def convert(source: Path, out: Path) -> None:
    """Runs DeepSpeed's converter on the folder of a tag."""
    from deepspeed.checkpoint import ds_to_universal  # before `restricted`, whose list has classes of DeepSpeed

    workers = min(4, os.cpu_count() or 1)
    settings = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(out),
        num_extract_workers=workers,
        num_merge_workers=min(2, workers),
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with restricted(source.parent):
        ds_to_universal.main(settings)


def cut(universal: Path, out: Path, tp: int, rank: int) -> None:
    """Writes one tensor rank's part of a universal checkpoint."""
    shapes = _whole_shapes(universal)
    for folder in (p for p in (universal / "zero").iterdir() if p.is_dir()):
        name, target = folder.name, out / "zero" / folder.name
        target.mkdir(parents=True)
        for state in STATES:
            saved = torch.load(folder / f"{state}.pt", weights_only=True)
            whole = (saved["param"] if isinstance(saved, dict) else saved).view(shapes[name])
            torch.save({"param": part(name, whole, tp, rank).clone()}, target / f"{state}.pt")
        if (folder / "step.pt").exists():
            shutil.copy2(folder / "step.pt", target)
    shutil.copy2(universal / "zero" / "optimizer_state.pt", out / "zero")
    for path in universal.glob("*_model_states.pt"):
        shutil.copy2(path, out)


def _whole_shapes(universal: Path) -> dict[str, tuple[int, ...]]:
    """Returns the parameters' whole shapes, from the shapes of one tensor rank's parts in the model files."""
    files = sorted(universal.glob("*mp_rank_*_model_states.pt"))
    tp = 1 + max(int(path.name.split("mp_rank_")[1][:2]) for path in files)
    groups = torch.load(files[0], map_location="cpu", weights_only=True)["param_shapes"]
    return {name: whole_shape(name, shape, tp) for group in groups for name, shape in group.items()}


if __name__ == "__main__":
    with command("ssa_pretrain.engine.deepspeed.universal"):
        main()
