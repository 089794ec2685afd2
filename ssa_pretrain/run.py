"""A run: its parts on one rank, how they are built, and what its ranks must have in common.

The order is `locked_folder`, `build_run`, then restoring a checkpoint (resume.py). Every rank calls every function of this module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from ssa_pretrain.checkpoint.facts import run_facts
from ssa_pretrain.checkpoint.integrity import Verdicts
from ssa_pretrain.config import Config
from ssa_pretrain.data.batches import Packing
from ssa_pretrain.data.indexed_format import Manifest, load_manifest
from ssa_pretrain.data.rows import ORDER, HeldOutRows, TrainingRows
from ssa_pretrain.engine import Engine, build_engine
from ssa_pretrain.errors import DataError
from ssa_pretrain.monitor.console import with_timestamps
from ssa_pretrain.monitor.environment import versions
from ssa_pretrain.parallel.agreement import differences_from_rank_0, on_rank_0, ranks_without
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.planning.plan import Plan, make_plan
from ssa_pretrain.run_folder import lock_folder, marker_is_visible, write_marker
from ssa_pretrain.settings.convert import config_to_dict
from ssa_pretrain.settings.files import unlock
from ssa_pretrain.settings.problems import ConfigError, Problem

NODE_SETTINGS = ("data.path", "output_dir", "logging.", "checkpoint.init_from", "dry_run")  # may differ between nodes
MOST_SHOWN = 8  # differences between ranks


@dataclass(slots=True)
class Run:
    """Everything that a run consists of, on one rank."""

    config: Config
    plan: Plan
    placement: Placement
    manifest: Manifest
    engine: Engine
    rows: TrainingRows | None  # None: the run only evaluates
    held_out: HeldOutRows
    folder: Path
    verdicts: Verdicts = field(default_factory=Verdicts)  # on its checkpoints; used on rank 0

    @property
    def last_step(self) -> int:
        """The step after which this process ends."""
        return min(self.plan.steps, self.config.training.stop_at_step or self.plan.steps)

    @property
    def device_name(self) -> str:
        """The device, such as "NVIDIA H200" or "CPU"."""
        device = self.placement.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"

    def print(self, text: str) -> None:
        """Prints a text, on rank 0 only."""
        if self.placement.is_rank_0:
            print(with_timestamps(text, self.config.logging.timestamps), flush=True)

    def contract(self) -> dict[str, Any]:
        """Returns the facts that a resumed run must share with its checkpoint: all that decides the losses except layout and schedule."""
        facts = run_facts(
            self.config,
            fingerprint=self.manifest.fingerprint,
            padded_vocab_size=self.plan.padded_vocab_size,
            tokenizer_sha256=self.manifest.tokenizer.sha256,
        )
        if self.rows and self.rows.order > 1:  # a checkpoint without this fact was written under row order 1
            facts["data.order"] = self.rows.order
        return facts


def packing_of(config: Config) -> Packing:
    """Returns how the rows of a run become microbatches."""
    return Packing(
        micro_batch_size=config.training.micro_batch_size,
        isolate_documents=config.data.isolate_documents,
        padding_document=config.attention.block_size * config.attention.top_k,
    )


@contextmanager
def locked_folder(config: Config, placement: Placement) -> Iterator[None]:
    """Holds the run's folder against other runs.

    Raises:
        ConfigError: on every rank, if another run holds the folder, it cannot be written, or the ranks do not share it.
    """
    folder, timestamps = Path(config.output_dir), config.logging.timestamps

    def take() -> TextIO | None:
        return lock_folder(folder, lambda text: print(with_timestamps(text, timestamps), flush=True))

    lock = on_rank_0(take, is_rank_0=placement.is_rank_0, errors=(ConfigError,))
    try:
        if placement.world_size > 1:
            require_shared_folder(folder, placement)
        yield
    finally:
        if lock is not None:
            unlock(lock)


def build_run(config: Config, placement: Placement, *, trains: bool = True) -> Run:
    """Builds the parts of a run; nothing is restored yet.

    Args:
        config: the checked configuration.
        placement: this process's place.
        trains: False reads only the held-out split.

    Raises:
        DataError: the data is missing, damaged or too small.
        ConfigError: the ranks differ in settings, data or libraries.
    """
    try:
        manifest = load_manifest(Path(config.data.path))
        rows = training_rows(config, manifest) if trains else None
        held_out = HeldOutRows(manifest, sequence_length=config.data.sequence_length, rows=config.evaluation.rows)
    except ValueError as error:
        raise DataError(str(error)) from error
    vocab_size = config.model.vocab_size or manifest.tokenizer.vocab_size
    plan = make_plan(config, placement.world_size, vocab_size)
    if placement.world_size > 1:
        require_same_run(config, manifest)
    engine = build_engine(config, placement, vocab_size)
    return Run(config, plan, placement, manifest, engine, rows, held_out, Path(config.output_dir))


def training_rows(config: Config, manifest: Manifest, order: int = ORDER) -> TrainingRows:
    """Returns the rows of a run under a version of their order."""
    length, weights = config.data.sequence_length, config.data.weights
    return TrainingRows(manifest, sequence_length=length, seed=config.seed, weights=weights, order=order)


def require_shared_folder(folder: Path, placement: Placement) -> None:
    """Raises ConfigError on every rank unless all see the folder of rank 0: otherwise each node would keep a part of every checkpoint."""
    marker: list[str | None] = [write_marker(folder) if placement.is_rank_0 else None]
    dist.broadcast_object_list(marker, src=0)
    blind = ranks_without(lambda: marker_is_visible(folder, str(marker[0])))
    if placement.is_rank_0:
        (folder / str(marker[0])).unlink(missing_ok=True)
    if blind:
        more = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
        rule = f"is not one folder for all processes: {blind[0]}{more} does not see what rank 0 wrote there"
        raise ConfigError([Problem("output_dir", str(folder), rule, "try a folder on storage that all nodes share")])


def require_same_run(config: Config, manifest: Manifest) -> None:
    """Raises ConfigError on every rank if one was started with other settings, data or library versions than rank 0."""
    values = {key: value for key, value in flattened(config_to_dict(config)) if not key.startswith(NODE_SETTINGS)}
    values["data"] = manifest.fingerprint
    values |= {f"version of {name}": version for name, version in versions().items() if name != "python"}
    if differences := differences_from_rank_0(values):
        advice = "give the same command, data and environment on every node"
        raise ConfigError(
            [Problem(name, value, f"on {where}", advice) for name, value, where in differences[:MOST_SHOWN]]
        )


def flattened(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a tree with their keys, such as "optim.lr"."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
