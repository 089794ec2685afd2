"""A DeepSpeed checkpoint reshaped: DeepSpeed's converter to its universal form, then cut for a number of tensor ranks.

    python -m ssa_pretrain.deepspeed_universal CHECKPOINT/deepspeed OUT TP [PARENT]

OUT then holds a folder `tp_NN` for each tensor rank, which DeepSpeed loads as a universal checkpoint of a model that is the rank's part. DeepSpeed's
own cutting is not used: under ZeRO-3 it knows only AutoTP's models. A process without a GPU suffices; a resume on other degrees calls this by itself
and names its process as the PARENT, with which the converter and its workers end.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch

from ssa_pretrain.parallel.parent import end_forks_with_this_process, end_with_parent

TAG = "deepspeed"
STATES = ("fp32", "exp_avg", "exp_avg_sq")


def main() -> None:
    """Convert, then cut."""
    if len(sys.argv) > 4:
        end_with_parent(int(sys.argv[4]))
        end_forks_with_this_process()
    source, out, tp = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    whole = out / "whole"
    convert(source, whole)
    for rank in range(tp):
        cut(whole, out / f"tp_{rank:02d}" / TAG, tp, rank)
    shutil.rmtree(whole)


def convert(source: Path, out: Path) -> None:
    """Run DeepSpeed's converter on the folder of a tag."""
    from deepspeed.checkpoint import ds_to_universal

    workers = min(4, os.cpu_count() or 1)
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(source),
            output_folder=str(out),
            num_extract_workers=workers,
            num_merge_workers=min(2, workers),
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
    )


def cut(whole: Path, out: Path, tp: int, rank: int) -> None:
    """Write one tensor rank's part of a universal checkpoint."""
    shapes = _shapes(whole)
    for folder in (p for p in (whole / "zero").iterdir() if p.is_dir()):
        target = out / "zero" / folder.name
        target.mkdir(parents=True)
        for state in STATES:
            held = torch.load(folder / f"{state}.pt", weights_only=False)
            full = (held["param"] if isinstance(held, dict) else held).view(shapes[folder.name])
            torch.save({"param": part(folder.name, full, tp, rank).clone()}, target / f"{state}.pt")
        if (folder / "step.pt").exists():
            shutil.copy2(folder / "step.pt", target)
    shutil.copy2(whole / "zero" / "optimizer_state.pt", out / "zero")
    for path in whole.glob("*_model_states.pt"):
        shutil.copy2(path, out)


def part(name: str, full: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    """Return a tensor rank's part of a whole parameter, or of one of its moments."""
    if tp == 1 or full.dim() < 2:
        return full
    if "linear_fc1" in name:  # [gate; up], each sharded on its own
        return torch.cat([half.chunk(tp, dim=0)[rank] for half in full.chunk(2, dim=0)])
    return full.chunk(tp, dim=1 if "linear_proj" in name or "linear_fc2" in name else 0)[rank]


def _shapes(whole: Path) -> dict[str, list[int]]:
    """Return the parameters' whole shapes, from the tensor ranks' parts that the model files tell of."""
    files = sorted(whole.glob("*mp_rank_*_model_states.pt"))
    tp = 1 + max(int(path.name.split("mp_rank_")[1][:2]) for path in files)
    record = torch.load(files[0], map_location="cpu", weights_only=False)["param_shapes"]
    shapes = {}
    for group in record:
        for name, shape in group.items():
            size = list(shape)
            if len(size) > 1:
                size[1 if "linear_proj" in name or "linear_fc2" in name else 0] *= tp
            shapes[name] = size
    return shapes


if __name__ == "__main__":
    main()
