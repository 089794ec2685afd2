"""A run's folder with one checkpoint, written in this process by the code that a run uses, after one step on random tokens."""

import json
import shutil
from pathlib import Path

from ssa_pretrain.checkpoint.facts import run_facts
from ssa_pretrain.checkpoint.integrity import record_text
from ssa_pretrain.checkpoint.publish import publish
from ssa_pretrain.config import Config
from ssa_pretrain.engine import Engine, build_engine
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.settings.convert import save_config
from support.layout_worker import batches


def write_run(folder: Path, config: Config, placement: Placement, vocab_size: int, *, step: int = 3) -> Engine:
    """Writes the folder, and returns the engine with the checkpoint's weights: after a step no two tensors are alike.

    Args:
        folder: of the run; does not exist.
        config: of the run.
        placement: this process's; a world of one.
        vocab_size: before padding.
        step: of the checkpoint.
    """
    engine = build_engine(config, placement, vocab_size)
    engine.train_step(batches(config, 0, 1, 0), step=0, learning_rate=0.1).result()
    folder.mkdir(parents=True)
    padded = config.model.padded_vocab_size(vocab_size)
    facts = run_facts(config, fingerprint="abc", padded_vocab_size=padded, tokenizer_sha256="def")
    publish(folder, step, facts, lambda scratch: _save(engine, scratch), keep=1, is_rank_0=True)
    save_config(config, folder / "config.yaml")
    return engine


def without_common_weights(checkpoint: Path) -> None:
    """Turns a checkpoint into one that was saved with checkpoint.weights=false."""
    shutil.rmtree(checkpoint / "weights")
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    record["files"] = {name: entry for name, entry in record["files"].items() if not name.startswith("weights/")}
    (checkpoint / "checkpoint.json").write_text(record_text(record))


def _save(engine: Engine, scratch: Path) -> None:
    engine.save(scratch)
    engine.save_weights(scratch)
