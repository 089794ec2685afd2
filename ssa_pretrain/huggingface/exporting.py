"""Writes a checkpoint as a Hugging Face folder; every process of the command takes part.

The weights come from the common weights that every checkpoint holds (checkpoint/weights.py), so neither its engine nor its layout matters. A
checkpoint saved with checkpoint.weights=false is first loaded by its engine, which then writes them into a hidden folder. The processes share the
files of the export (shards.py); rank 0 adds the rest and renames the finished folder. A folder that exists is never written to.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ssa_pretrain.checkpoint.find import Checkpoint, newest
from ssa_pretrain.checkpoint.sharded_weights import save_weights
from ssa_pretrain.checkpoint.weights import WeightsReader, ema_weights, find_weights
from ssa_pretrain.config import Config, EngineName, Method, ParallelConfig
from ssa_pretrain.engine import build_engine, build_evaluator
from ssa_pretrain.errors import CheckpointError, DataError, ExitCode
from ssa_pretrain.huggingface.card import model_card
from ssa_pretrain.huggingface.multipliers import fold
from ssa_pretrain.huggingface.options import NO_DATA, Dtype, ExportOptions, Weights, byte_count
from ssa_pretrain.huggingface.settings import Mode, SpecialTokens, exported_config
from ssa_pretrain.huggingface.shards import plan_files, write_file, write_index
from ssa_pretrain.huggingface.tokenizer import TextTokenizer, dataset_tokenizer, write_tokenizer
from ssa_pretrain.huggingface.weights import EMBEDDING, Llama, training_shapes
from ssa_pretrain.parallel.agreement import exits_with_peers, on_all_ranks
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.settings.files import sync

KEY = "ssa_pretrain/failed_export"
NO_TOKENS = SpecialTokens(eos=None, bos=None)
# Of this package: what transformers runs, without ssa_pretrain.
MODELLING_FILES = {Method.nsa: ("modelling_ssa.py", "modelling_nsa.py")}
MODELLING_FILE = ("modelling_ssa.py",)  # of the other methods
DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported.

    Attributes:
        config: the run.
        checkpoint: one of the run's.
        weights: the folder of the checkpoint's common weights.
        llama: the model's sizes.
        tokenizer: of the run's data; None: no tokenizer is exported.
        run_folder: of the run.
    """

    config: Config
    checkpoint: Checkpoint
    weights: WeightsReader
    llama: Llama
    tokenizer: TextTokenizer | None
    run_folder: Path


def export(
    run_folder: Path, named: Path | None, config: Config, placement: Placement, options: ExportOptions
) -> Source:
    """Writes a checkpoint of a run as a Hugging Face folder; every rank calls it.

    Args:
        run_folder: of the run.
        named: the checkpoint; None: the run's newest.
        config: the run's configuration.
        placement: this process's coordinates, in any layout that loads the checkpoint.
        options: the command's settings.

    Returns:
        What was exported. Its weights may lie in a folder that is gone.

    Raises:
        CheckpointError: the run has no checkpoint, or a file could not be written, which leaves nothing behind.
        WeightsError: the checkpoint holds another model than the run's configuration.
        DataError: the tokenizer is missing, or is not the one of the training.
    """
    target = Path(options.out)
    scratch = target.with_name(f".{target.name}.tmp")
    checkpoint = _find(run_folder, named, placement)
    tokenizer = None
    if (data := options.data or config.data.path) != NO_DATA:
        tokenizer = dataset_tokenizer(Path(data), options.add_bos)
        if checkpoint.facts.get("vocabulary.tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
            raise DataError(
                f"data={data} has another tokenizer than the model was trained with: the same token ids stand for different text; "
                "name the dataset of the training, or data=none"
            )

    def all_ranks(act: Callable[[], object]) -> None:
        if message := on_all_ranks(
            act, KEY, lambda reason: f"{target} could not be written ({reason}); nothing was left of it"
        ):
            raise CheckpointError(message)

    try:
        with exits_with_peers(KEY, exit_code=ExitCode.CHECKPOINT):
            all_ranks(lambda: _create(scratch) if placement.is_rank_0 else None)
            is_mean = options.weights is Weights.ema
            reader = WeightsReader(
                ema_weights(checkpoint.folder) if is_mean else _common_weights(checkpoint, config, placement, scratch)
            )
            llama = Llama.of(config, reader.tensors.get(EMBEDDING, {"shape": [0]})["shape"][0])
            reader.require(training_shapes(llama), exact=True)
            source = Source(config, checkpoint, reader, llama, tokenizer, run_folder)
            all_ranks(lambda: _write_share(scratch, source, placement, options))
            all_ranks(lambda: _complete(scratch, source, options) if placement.is_rank_0 else None)
            all_ranks(lambda: _rename(scratch, target) if placement.is_rank_0 else None)
    finally:
        if placement.is_rank_0:
            shutil.rmtree(scratch, ignore_errors=True)
    return source


def layout_for(config: Config, world_size: int) -> ParallelConfig:
    """Returns the run's layout if it fits the number of processes, otherwise data parallelism alone: checkpoints load on any."""
    parallel = config.parallel
    fits = world_size % (parallel.tp * parallel.pp * parallel.cp) == 0
    return replace(parallel, world_size=0) if fits else ParallelConfig(timeout_minutes=parallel.timeout_minutes)


def _find(run_folder: Path, named: Path | None, placement: Placement) -> Checkpoint:
    """Returns the checkpoint to export, after its files were compared with their sha256."""

    def report(text: str) -> None:
        if placement.is_rank_0:
            print(text, flush=True)

    found = newest(named or run_folder, is_rank_0=placement.is_rank_0, device=placement.device, report=report)
    if found is None:
        raise CheckpointError(f"{run_folder} holds no checkpoint; give the folder of a run that has saved one")
    return found


def _common_weights(checkpoint: Checkpoint, config: Config, placement: Placement, scratch: Path) -> Path:
    """Returns the folder of a checkpoint's common weights; without them, its engine loads the checkpoint and writes them into `scratch`."""
    if found := find_weights(checkpoint.folder):
        return found
    engine = replace(config.engine, overlap_tp=False)  # its buffers have the shape of a training microbatch
    config = replace(config, parallel=layout_for(config, placement.world_size), engine=engine)
    vocab_size = config.model.vocab_size or checkpoint.facts["vocabulary.padded_size"]
    if config.engine.name is EngineName.megatron:
        model = build_evaluator(config, placement, vocab_size)
        model.load_weights(checkpoint.folder)
        save_weights(scratch, model.models, config, placement)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        config = replace(config, output_dir=str(scratch))  # a checkpoint is reshaped there
        trained = build_engine(config, placement, vocab_size)
        trained.load(checkpoint.folder)  # DeepSpeed's weights lie in its optimizer's files
        trained.save_weights(scratch)
    return scratch / "weights"


def _create(scratch: Path) -> None:
    """Creates the hidden folder, without what a killed export may have left."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)


def _write_share(scratch: Path, source: Source, placement: Placement, options: ExportOptions) -> None:
    """Writes this rank's files of weights."""
    dtype, most = DTYPES[options.dtype], byte_count(options.max_shard_size)
    assert most is not None

    def read(name: str) -> torch.Tensor:
        return fold(name, source.weights.read(name), source.config)

    files = plan_files(source.llama, dtype.itemsize, most)
    for number, (name, tensors) in enumerate(files.items()):
        if number % placement.world_size == placement.rank:
            write_file(scratch / name, tensors, read, source.llama, dtype)
            sync(scratch / name)
    if placement.is_rank_0:
        write_index(scratch, files, source.llama, dtype.itemsize)


def _complete(scratch: Path, source: Source, options: ExportOptions) -> None:
    """Writes everything but the weights."""
    config, tokenizer = source.config, source.tokenizer
    tokens = tokenizer.tokens if tokenizer else NO_TOKENS
    method = config.attention.method
    sparse_only = method is Method.indexer or "full" not in method.streams  # indexer ends with sparse attention alone
    mode = options.attention_mode or (Mode.sparse if sparse_only else Mode.full)
    dtype = str(DTYPES[options.dtype]).removeprefix("torch.")
    exported = exported_config(config, source.llama.vocab_size, tokens, mode, dtype)
    generation = {
        "do_sample": False,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.eos,
    }
    _write_json(scratch / "config.json", exported)
    _write_json(
        scratch / "generation_config.json", {key: value for key, value in generation.items() if value is not None}
    )
    if tokenizer:
        write_tokenizer(scratch, tokenizer, config.data.sequence_length)
    for name in MODELLING_FILES.get(method, MODELLING_FILE):
        shutil.copyfile(Path(__file__).with_name(name), scratch / name)
    step = source.checkpoint.step
    is_mean = options.weights is Weights.ema
    found = None if is_mean else _evaluation(source.run_folder, step)
    card = model_card(config, step, source.llama.vocab_size, exported, found, ema=is_mean)
    (scratch / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(scratch / "weights", ignore_errors=True)  # of a checkpoint without common weights


def _evaluation(run_folder: Path, step: int) -> dict[str, Any] | None:
    """Returns the run's evaluation if it is of this step."""
    path = run_folder / "evaluation.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("step") == step else None


def _rename(scratch: Path, target: Path) -> None:
    """Publishes the finished folder; OSError if another command has created the target meanwhile."""
    sync(scratch)
    if target.exists():
        raise FileExistsError(f"{target} was created by another command")
    scratch.rename(target)
    sync(target.parent)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
