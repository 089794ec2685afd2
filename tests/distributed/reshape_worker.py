"""A rank of test_deepspeed_reshape.py: loads a checkpoint of another layout, and one step of it fails."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from ssa_pretrain.checkpoint.weights import WeightsError
from ssa_pretrain.config import Config
from ssa_pretrain.engine.deepspeed import checkpoint


def main(case: str, folder: Path) -> None:
    """Runs a case: the converter fails on rank 0, or rank 1 cannot load."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def convert(source: Path, universal: Path, _: dict) -> None:
        universal.mkdir(parents=True)
        if case == "convert":
            raise WeightsError(f"{source} could not be reshaped")

    def load(_: Path, __: object) -> None:
        if case == "load" and rank == 1:
            raise WeightsError("a part is missing")

    checkpoint._convert = convert
    checkpoint._load_universal = load
    config = Config()
    config.deepspeed.zero_stage, config.output_dir = 2, str(folder.parent / "run")
    placement = SimpleNamespace(is_rank_0=rank == 0, tp_rank=0, dp=2)
    try:
        checkpoint.load(folder, None, config, placement)  # pyright: ignore[reportArgumentType]
        outcome = "loaded"
    except (WeightsError, RuntimeError) as error:
        outcome = type(error).__name__ + ": " + str(error)
    (folder / f"outcome_{rank}").write_text(json.dumps(outcome))
    if case != "load":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
