"""A rank of test_optimizer_shards.py. Arguments: a folder, and a JSON object of settings by case."""

import json
import sys
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from ssa_pretrain.checkpoint import writer
from ssa_pretrain.engine import build_engine
from ssa_pretrain.engine.megatron import checkpoint
from ssa_pretrain.engine.megatron.checkpoint import METADATA
from ssa_pretrain.parallel.state import start
from support.layout_worker import LENGTH, VOCAB, batches, configure

SMALL = {"model.num_layers": 2, "training.micro_batch_size": 2, "training.global_batch_tokens": 8 * LENGTH}


def save_by_core(folder: Path, engine) -> None:
    """Writes what core makes of the optimizer: whole tensors, gathered on every data rank."""
    state = checkpoint._model_state(engine.chunks)
    state["optimizer"] = engine.optimizer.sharded_state_dict(state, metadata=dict(METADATA))
    writer.write(folder, state, dict(METADATA))


def load_by_core(folder: Path, engine) -> None:
    """Loads whole tensors and lets core cut its ranges out of them."""
    state = checkpoint._model_state(engine.chunks)
    state["optimizer"] = engine.optimizer.sharded_state_dict(state, is_loading=True, metadata=dict(METADATA))
    loaded = cast(dict[str, Any], dist_checkpointing.load(state, str(folder)))
    for i, chunk in enumerate(engine.chunks):
        checkpoint.unwrap(chunk).load_state_dict(loaded[checkpoint._model_key(i, engine.chunks)], strict=True)
    shards = loaded["optimizer"].pop("param_state")
    engine.optimizer.load_state_dict(loaded["optimizer"])
    (inner,) = checkpoint.inner_optimizers(engine.optimizer)
    # Core takes it for a shard. Transformer Engine's optimizer keeps it elsewhere.
    steps = [(state, state.pop("step").clone()) for state in inner.state.values() if "step" in state]
    engine.optimizer.chained_optimizers[0].load_parameter_state_from_fully_reshardable(shards)
    for state, step in steps:
        state["step"] = step


def run(out: Path, settings: dict) -> None:
    """Writes a state in both ways, and what training continues with after reading either in either way."""
    config = configure(SMALL | settings)
    placement = start(config.parallel, seed=1)
    folders = {"own": out / "own", "core": out / "core"}
    if placement.is_rank_0:
        for folder in folders.values():
            folder.mkdir(parents=True)
    dist.barrier()
    engine = build_engine(config, placement, VOCAB)

    def train(steps: range) -> list[float]:
        mine = [batches(config, placement.dp_rank, placement.dp, step) for step in steps]
        done = [engine.train_step(data, step=step, learning_rate=1e-2) for step, data in zip(steps, mine, strict=True)]
        return [value for result in done for value in (result.result().cross_entropy, result.result().grad_norm)]

    train(range(2))
    engine.save(folders["own"])
    save_by_core(folders["core"], engine)
    results = {"live": train(range(2, 4))}
    for name, folder in folders.items():
        engine.load(folder)
        results[f"{name} read by us"] = train(range(2, 4))
    load_by_core(folders["own"], engine)
    results["own read by core"] = train(range(2, 4))
    (out / f"results_{placement.rank}.json").write_text(json.dumps(results))
    dist.barrier()
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    for case, chosen in json.loads(sys.argv[2]).items():
        run(Path(sys.argv[1]) / case, chosen)
    dist.destroy_process_group()
