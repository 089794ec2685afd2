"""A run of six short steps in the test's own process, for tests that change what a save does."""

from pathlib import Path

from ssa_pretrain import trainer
from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config.machine import this_machine

SETTINGS = (
    "experiment=quickstart",
    "model.num_layers=2",
    "training.steps=6",
    "training.global_batch_tokens=512",
    "training.micro_batch_size=1",
    "data.sequence_length=128",
    "evaluation.rows=2",
    "evaluation.at_start=false",
    "evaluation.interval=0",
    "logging.wandb.mode=off",
)


def train(corpus: Path, folder: Path, *overrides: str) -> Path:
    """Trains in this process and returns the run's folder."""
    arguments = [*SETTINGS, f"data.path={corpus}", f"output_dir={folder}", *overrides]
    trainer.train(resolve_config("train", arguments, this_machine()))
    return folder
