"""A run on one rank: its objects, how they are built, and the checks that all ranks started the same run.

The order is `locked_folder`, `build_run`, then `restore` (resume.py). Every rank calls every function of this module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import torch
import torch.distributed as dist

from ssa_pretrain.checkpoint.facts import BATCH_STEPS, HISTORY, batch_changes, run_facts
from ssa_pretrain.checkpoint.integrity import Verdicts
from ssa_pretrain.config import Config, RowPacking, TrainingConfig
from ssa_pretrain.data.batches import Packing
from ssa_pretrain.data.manifest import Manifest, load_manifest
from ssa_pretrain.data.packed_index import index_folder, open_index, prepare
from ssa_pretrain.data.rows import ORDER, HeldOutRows, TrainingRows
from ssa_pretrain.engine import Engine, build_engine, build_evaluator
from ssa_pretrain.errors import DataError
from ssa_pretrain.health import Health
from ssa_pretrain.incidents import Incident
from ssa_pretrain.monitor.console import with_timestamps
from ssa_pretrain.monitor.environment import versions
from ssa_pretrain.parallel.agreement import differences_from_rank_0, on_all_ranks, on_rank_0, ranks_without
from ssa_pretrain.parallel.state import Placement, launched_local_rank
from ssa_pretrain.planning.epochs import mixture_stages
from ssa_pretrain.planning.plan import Plan, make_plan
from ssa_pretrain.run_folder import lock_folder, marker_is_visible, write_marker
from ssa_pretrain.settings.convert import config_to_dict
from ssa_pretrain.settings.files import unlock
from ssa_pretrain.settings.problems import ConfigError, Problem
from ssa_pretrain.settings.tree import flatten_settings
from ssa_pretrain.step_ranges import Range, merged, up_to

if TYPE_CHECKING:
    from ssa_pretrain.evaluation.tasks import Task

NODE_SETTINGS = (
    "data.path",
    "data.index_path",
    "output_dir",
    "logging.",
    "checkpoint.init_from",
    "checkpoint.branch_from",
    "dry_run",
)  # may differ between nodes
MAX_LISTED = 8  # differences between ranks


@dataclass(slots=True)
class Run:
    """The objects of a run on one rank. A run that only evaluates has no rows, and its engine is only an `Evaluator`."""

    config: Config
    plan: Plan
    placement: Placement
    manifest: Manifest
    engine: Engine
    rows: TrainingRows | None
    held_out: HeldOutRows
    folder: Path
    verdicts: Verdicts = field(default_factory=Verdicts)  # on the run's checkpoints; used on rank 0
    tasks: "list[Task]" = field(default_factory=list)
    health: Health = field(default_factory=lambda: Health(TrainingConfig()))
    incidents: list[Incident] = field(default_factory=list)  # by step; the same on every rank
    history: list[dict[str, Any]] = field(default_factory=list)  # of a branch: the runs that it continues, oldest first

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

    @property
    def left_out(self) -> list[Range]:
        """The steps whose data is left out, by the configuration or after rollbacks."""
        return merged([*self.config.training.skip_steps, *(i.skipped_steps for i in self.incidents if i.skipped_steps)])

    def contract(self, step: int = 0) -> dict[str, Any]:
        """Returns the facts on which a resumed run and its checkpoint must agree: everything that decides the losses, except layout and schedule.

        Args:
            step: the checkpoint's. Steps that were left out, changes of the batch and stages of the mixture that began before it are facts; later ones
                are not.
        """
        facts = run_facts(
            self.config,
            fingerprint=self.manifest.fingerprint,
            padded_vocab_size=self.plan.padded_vocab_size,
            tokenizer_sha256=self.manifest.tokenizer.sha256,
            step=step,
        )
        if self.rows and self.rows.order > 1:  # a checkpoint without this fact was written under row order 1
            facts["data.order"] = self.rows.order
        if left_out := up_to(self.left_out, step):
            facts["training.skip_steps"] = [list(pair) for pair in left_out]
        if changes := batch_changes(self.config, step):
            facts[BATCH_STEPS] = changes
        if self.history:
            facts[HISTORY] = self.history
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
    """Locks the run's folder against other runs while the context is open.

    Raises:
        ConfigError: on every rank, if another run has locked the folder, it cannot be written, or the ranks do not share it.
    """
    folder, timestamps = Path(config.output_dir), config.logging.timestamps

    def acquire() -> TextIO | None:
        return lock_folder(folder, lambda text: print(with_timestamps(text, timestamps), flush=True))

    lock = on_rank_0(acquire, is_rank_0=placement.is_rank_0, errors=(ConfigError,))
    try:
        if placement.world_size > 1:
            require_shared_folder(folder, placement)
        yield
    finally:
        if lock is not None:
            unlock(lock)


def build_run(config: Config, placement: Placement, *, trains: bool = True) -> Run:
    """Builds a run with its initial weights. No checkpoint is loaded yet.

    Args:
        config: the checked configuration.
        placement: this process's coordinates.
        trains: False opens only the held-out split and builds no optimizer.

    Raises:
        DataError: the data is missing, damaged or too small.
        ConfigError: the ranks differ in settings, data or libraries.
    """
    try:
        manifest = load_manifest(Path(config.data.path))
        held_out = HeldOutRows(manifest, sequence_length=config.data.sequence_length, rows=config.evaluation.rows)
    except ValueError as error:
        raise DataError(str(error)) from error
    vocab_size = config.model.vocab_size or manifest.tokenizer.vocab_size
    plan = make_plan(config, placement.world_size, vocab_size)
    if placement.world_size > 1:
        require_same_run(config, manifest)
    rows = open_rows(config, manifest, placement) if trains else None
    build = build_engine if trains else build_evaluator
    engine = cast(Engine, build(config, placement, vocab_size))
    folder, health = Path(config.output_dir), Health(config.training)
    return Run(config, plan, placement, manifest, engine, rows, held_out, folder, health=health)


def open_rows(config: Config, manifest: Manifest, placement: Placement) -> TrainingRows:
    """Returns the training rows of a new run; under data.packing=best_fit builds their index if necessary. Every rank calls it.

    Raises:
        DataError: the data is too small or its index cannot be written.
    """
    if config.data.packing is RowPacking.best_fit:
        prepare_index(config, manifest, placement)
    try:
        return training_rows(config, manifest)
    except ValueError as error:
        raise DataError(str(error)) from error


def prepare_index(config: Config, manifest: Manifest, placement: Placement) -> None:
    """Makes sure that every node has the index of data.packing=best_fit: rank 0 builds it, then one process of each node that does not see it.

    Raises:
        DataError: on every rank, if a node cannot write it.
    """
    is_first_here = launched_local_rank() == 0
    folder = index_folder(manifest, config.data.sequence_length, config.data.index_path).parent

    def act() -> None:
        done = prepare(manifest, config.data.sequence_length, config.data.index_path)
        if placement.is_rank_0:
            print(with_timestamps(done, config.logging.timestamps), flush=True)

    for builds in (placement.is_rank_0, is_first_here and not placement.is_rank_0):
        if failure := on_all_ranks(act if builds else lambda: None, "packing"):
            advice = "try data.index_path=FOLDER on a disk of each node, or on storage that all nodes share"
            raise DataError(f"data.packing=best_fit cannot keep its index in {folder} ({failure}); {advice}")


def training_rows(config: Config, manifest: Manifest, order: int = ORDER) -> TrainingRows:
    """Returns the training rows of a run in the given version of the row order; under best fit the index exists."""
    length, packed = config.data.sequence_length, None
    if config.data.packing is RowPacking.best_fit:
        packed = open_index(manifest, length, config.data.index_path)
        if packed is None:
            folder = index_folder(manifest, length, config.data.index_path)
            raise ValueError(
                f"data.packing=best_fit finds no index in {folder}; remove the folder, and the next start builds it"
            )
    stages = mixture_stages(config)
    return TrainingRows(manifest, sequence_length=length, seed=config.seed, weights=stages, order=order, packed=packed)


def require_shared_folder(folder: Path, placement: Placement) -> None:
    """Raises ConfigError on every rank unless all ranks see the folder of rank 0. Otherwise each node would keep a part of every checkpoint."""
    marker: list[str | None] = [write_marker(folder) if placement.is_rank_0 else None]
    dist.broadcast_object_list(marker, src=0)
    missing = ranks_without(lambda: marker_is_visible(folder, str(marker[0])))
    if placement.is_rank_0:
        (folder / str(marker[0])).unlink(missing_ok=True)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        rule = (
            f"is not the same folder for all processes: {missing[0]}{more} does not see a file that rank 0 wrote there"
        )
        raise ConfigError([Problem("output_dir", str(folder), rule, "try a folder on storage that all nodes share")])


def require_same_run(config: Config, manifest: Manifest) -> None:
    """Raises ConfigError on every rank if settings, data or library versions of any rank differ from those of rank 0."""
    values = {
        key: value for key, value in flatten_settings(config_to_dict(config)) if not key.startswith(NODE_SETTINGS)
    }
    values["data"] = manifest.fingerprint
    values |= {f"version of {name}": version for name, version in versions().items() if name != "python"}
    if differences := differences_from_rank_0(values):
        advice = "give the same command, data and environment on every node"
        raise ConfigError(
            [Problem(name, value, f"on {where}", advice) for name, value, where in differences[:MAX_LISTED]]
        )
