"""One process of a layout test: for each case, build the engine on that layout, run steps, and write losses, gradients and weights.

Arguments: a JSON file with the cases (name -> configuration overrides) and the folder for results. Cases of one world size share the processes, and
cases of one layout share the process groups: core never destroys them, and each keeps gloo threads alive.
"""

import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig

from ssa_pretrain.config import Config
from ssa_pretrain.data.batches import Batch, collate
from ssa_pretrain.data.rows import Row
from ssa_pretrain.engine import StepResult, build_engine
from ssa_pretrain.engine.megatron.checkpoint import unwrap
from ssa_pretrain.model.sharding import global_name, partition_dim
from ssa_pretrain.parallel.state import Placement, start
from ssa_pretrain.settings.convert import config_from_dict, config_to_dict

VOCAB, LENGTH, ROWS = 96, 96, 4
PARTS = 3  # of the corpus; row i is from part i % PARTS


def configure(overrides: dict) -> Config:
    """Returns the small test model's configuration with a case's dotted overrides."""
    tree = config_to_dict(Config())
    base = {
        "model.num_layers": 4,
        "model.hidden_size": 32,
        "model.ffn_hidden_size": 48,
        "model.head_dim": 8,
        "model.init_std": 0.2,  # far from init's near-zero attention, so that the streams differ and the alignment weighs
        "model.vocab_divisor": 32,
        "attention.top_k": 2,
        "attention.alignment_weight": 30.0,
        "optim.eps": 1e-2,  # far above rounding: Adam's first steps divide by the gradient's size and would blow noise up to a step
        "data.sequence_length": LENGTH,
        "data.path": "none",
        "precision.name": "fp32",
        "attention.impl": "reference",
        "engine.layer_spec": "local",
        "training.steps": 1,
        "training.global_batch_tokens": ROWS * LENGTH,
    }
    for key, value in (base | overrides).items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node[part]
        assert last in node, key
        node[last] = value
    config, problems = config_from_dict(Config, tree)
    assert not problems, problems
    return config


def rows_with_documents(
    starts_by_row: Sequence[Sequence[int]], generator: np.random.Generator, *, length: int = LENGTH, vocab: int = VOCAB
) -> list[Row]:
    """Returns rows of random tokens whose documents begin at the given places."""
    rows = []
    for places in starts_by_row:
        starts = np.zeros(length + 1, dtype=bool)
        starts[list(places)] = True
        rows.append(Row(generator.integers(0, vocab, length + 1), starts))
    return rows


def batches(config: Config, dp_rank: int, dp: int, step: int, num_rows: int = 0) -> list[Batch]:
    """Returns this data rank's microbatches of the global batch: packed documents of uneven lengths, the last row half padding.

    With `num_rows`, returns those of so many rows instead.
    """
    generator = np.random.default_rng(step)
    num_rows = num_rows or config.training.global_batch_tokens // LENGTH
    rows = []
    for _ in range(num_rows):
        starts = np.zeros(LENGTH + 1, dtype=bool)
        starts[generator.integers(1, LENGTH)] = True
        rows.append(Row(generator.integers(0, VOCAB, LENGTH + 1), starts))
    rows[-1].tokens[-LENGTH // 2 :] = 0
    rows[-1] = replace(rows[-1], padding=LENGTH // 2)
    return collated(rows, config, dp_rank, dp)


def collated(rows: Sequence[Row], config: Config, dp_rank: int, dp: int) -> list[Batch]:
    """Returns a data rank's microbatches of a global batch of rows."""
    rows, size = [replace(row, part=i % PARTS) for i, row in enumerate(rows)], config.training.micro_batch_size
    made = (collate(rows[i * size : (i + 1) * size], index=i) for i in range(dp_rank, len(rows) // size, dp))
    return [replace(batch, num_parts=PARTS) for batch in made]


def by_part(result: StepResult, whole: Sequence[Batch]) -> list[float]:
    """Returns the losses of a step by part of the corpus, after comparing its labels and their total with the microbatches of the global batch."""
    labels = [0] * PARTS
    for batch in whole:
        sizes = [count for _, count in batch.parts]
        for (part, _), mask in zip(batch.parts, batch.loss_mask[0].split(sizes), strict=True):
            labels[part] += int(mask.sum())
    assert [count for _, count in result.by_part] == labels and min(labels) > 0
    losses = [loss for loss, _ in result.by_part]
    assert abs(sum(losses) / sum(labels) / result.cross_entropy - 1.0) < 1e-6
    assert result.num_tokens == sum(len(batch.positions) - batch.num_padding for batch in whole)
    return losses


def gather_gradients(chunks: list) -> dict[str, dict]:
    """Returns this rank's reduced gradients by global parameter name, with where they sit in the whole."""
    found = {}
    for chunk in chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            for buffer in chunk.buffers:
                for bucket in buffer.buckets:
                    shards = list(bucket.grad_data.chunk(buffer.data_parallel_group.size()))
                    mine = shards[buffer.data_parallel_group.rank()].clone()
                    dist.all_gather(shards, mine, group=buffer.data_parallel_group)
        model = unwrap(chunk)
        tied = model.share_embeddings_and_output_weights
        offset = model.decoder.layers[0].layer_number - 1
        for name, parameter in model.named_parameters():
            copy = "output:" if tied and name.startswith("output_layer") else ""
            key = f"{copy}{global_name(name, offset, tied=tied)}"
            dim = getattr(parameter, "partition_dim", -1)
            assert dim == (-1 if partition_dim(name) is None else partition_dim(name)), f"{name} is cut along dim {dim}"
            found[key] = {
                "grad": parameter.main_grad.clone(),
                "weight": parameter.detach().clone(),
                "dim": dim,
            }
    return found


def capture_first_gradients(engine) -> dict[str, dict]:
    """Returns a dict that receives the reduced gradients of the engine's first step, before its optimizer reads them."""
    captured, step = {}, engine.optimizer.step

    def step_and_capture():
        if not captured:
            captured.update(gather_gradients(engine.chunks))
        return step()

    engine.optimizer.step = step_and_capture
    return captured


@contextmanager
def bucket_size(elements: int | None) -> Iterator[None]:
    """Lets core's data parallelism gather and reduce so many elements at once; None: core's 40 million, more than these models have."""
    settings = partial(DistributedDataParallelConfig, bucket_size=elements)
    with patch("ssa_pretrain.engine.megatron.engine.DistributedDataParallelConfig", settings):
        yield


def run_case(name: str, config: Config, placement: Placement, out: Path) -> None:
    """Runs two steps of one case and writes this rank's part."""
    with bucket_size(1024 if "small_buckets" in name else None):
        engine = build_engine(config, placement, VOCAB)
    records, captured = [], capture_first_gradients(engine)
    for index in range(2):
        local = batches(config, placement.dp_rank, placement.dp, index)
        begin = time.monotonic()
        pending = engine.train_step(local, step=index, learning_rate=1e-2)
        result = pending.result()
        assert 0 < pending.own_seconds() < time.monotonic() - begin
        none = [0.0] * config.model.num_layers  # of a method with one stream
        by_layer = [*(result.alignment_by_layer or none), *(result.captured_mass_by_layer or none)]
        own = by_part(result, batches(config, 0, 1, index))
        records.append([result.cross_entropy, result.grad_norm, *by_layer, *own])
    saved = {}
    if config.engine.overlap_param_gather:  # directly after a step, when only the owners of shards have its weights
        folder = out / f"{name}.checkpoint"
        folder.mkdir(exist_ok=True)
        dist.barrier()
        engine.save(folder)
        saved = {n: p.detach().clone() for n, p in unwrap(engine.chunks[0]).named_parameters()}
    held_out = batches(config, placement.dp_rank, placement.dp, 99)
    for mode in ("full", "sparse"):
        judged = engine.evaluate(held_out, mode=mode)
        layers = [*judged.alignment_by_layer, *judged.captured_mass_by_layer]
        records.append([judged.cross_entropy, 0.0, *layers, *[0.0] * PARTS])
    part = {
        "records": records,
        "parameters": captured,
        "saved": saved,
        "tp_rank": placement.tp_rank,
        "dp_rank": placement.dp_rank,
        "pp_rank": placement.pp_rank,
    }
    torch.save(part, out / f"{name}.{placement.rank}.pt")


def free_memory() -> None:
    """Returns a case's memory to the GPU, on which other ranks may run."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def run_cases(
    run_case: Callable[[str, Config, Placement, Path], None], prepare: Callable[[Placement], None] = lambda _: None
) -> None:
    """Runs all cases of the file, layout by layout; `prepare` is called once per layout."""
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    configs = {name: configure(overrides) for name, overrides in cases.items()}
    ordered = sorted(configs, key=lambda name: repr(configs[name].parallel))
    for layout, names in itertools.groupby(ordered, key=lambda name: configs[name].parallel):
        placement = start(layout, seed=1)
        prepare(placement)
        for name in names:
            run_case(name, configs[name], placement, out)
            free_memory()
        dist.barrier()
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    run_cases(run_case)
