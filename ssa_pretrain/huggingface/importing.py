"""Reads a Hugging Face folder into a run's folder whose checkpoint holds weights only, for any layout and either engine.

The result has a config.yaml with the model and `checkpoints/step_00000000`, written and hashed like every checkpoint. A run starts from it with
`checkpoint.init_from`; `evaluate` and `export` take it like any run. It holds no optimizer state, so the optimizer starts fresh.

A Llama has no attention gate. With gate=off the model stays without. With gate=open the gates' weights are 0, so each gate is sigmoid(0) = 1/2, and
the output projection is doubled. Both factors are powers of two, so the function is the same to the bit, and the gates have a gradient.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssa_pretrain.checkpoint.facts import run_facts
from ssa_pretrain.checkpoint.publish import publish
from ssa_pretrain.checkpoint.weights import WeightsWriter
from ssa_pretrain.checkpoint.weights import write_index as write_weights_index
from ssa_pretrain.config import Config, Method
from ssa_pretrain.errors import WeightsError
from ssa_pretrain.huggingface.options import NO_DATA, Gate, ImportOptions
from ssa_pretrain.huggingface.released import keep_used_gates
from ssa_pretrain.huggingface.settings import FOREIGN, MODEL_TYPE, RELEASED, imported_model
from ssa_pretrain.huggingface.shards import HuggingFaceReader
from ssa_pretrain.huggingface.weights import (
    EMBEDDING,
    HF_EMBEDDING,
    HF_OUTPUT,
    OUTPUT,
    Llama,
    from_hugging_face,
    tensor_names,
    tensor_shapes,
)
from ssa_pretrain.settings.convert import save_config
from ssa_pretrain.settings.problems import ConfigError, Problem

FOREIGN_LENGTH = 8192  # of rows, for models that name a longer input than anyone trains on at first
IGNORED = "rotary_emb.inv_freq"  # a table that old files list among the weights


def read_record(folder: Path) -> dict[str, Any]:
    """Returns the content of a folder's config.json.

    Raises:
        WeightsError: it is missing or damaged.
    """
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{folder} is not a Hugging Face model (config.json: {error}); give a folder with config.json"
        ) from None
    if not isinstance(record, dict):
        raise WeightsError(f"{folder / 'config.json'} does not hold settings; give a folder with a model's config.json")
    return record


def imported_config(record: dict[str, Any], options: ImportOptions) -> Config:
    """Returns the configuration of an imported model: its config.json, and what the command sets.

    Raises:
        ConfigError: the model is not one that ssa_pretrain trains, or the settings do not fit it.
    """
    kind = record.get("model_type")
    if kind in FOREIGN and options.gate is None:
        rule = f"must be chosen: a {kind.capitalize()} has no attention gate"
        advice = "try gate=off (no gate) or gate=open (the same function with a gate that learns)"
        raise ConfigError([Problem("gate", None, rule, advice)])
    if kind in (MODEL_TYPE, RELEASED) and options.gate is not None:
        rule = f"is a choice for Llamas without one, and model_type={kind} settles it"
        raise ConfigError([Problem("gate", options.gate, rule, "leave it out")])
    name = options.name or Path(options.out).name
    model, attention, longest = imported_model(record, name)
    if options.vocab_divisor:
        model = replace(model, vocab_divisor=options.vocab_divisor)
    one_stream = {Method.ssa: {}, Method.full: {"full_ratio": 1.0}, Method.moba: {"full_ratio": 0.0}}[options.method]
    if one_stream:
        one_stream |= {"alignment_weight": 0.0}
    attention = replace(
        attention, method=options.method, gate=attention.gate or options.gate is Gate.open, **one_stream
    )
    length = options.sequence_length or (longest if kind == MODEL_TYPE else min(longest, FOREIGN_LENGTH))
    config = Config(name=name, output_dir=options.out, model=model, attention=attention)
    config = replace(
        config,
        data=replace(config.data, path=options.data or NO_DATA, sequence_length=length),
        training=replace(config.training, steps=1, micro_batch_size=1, global_batch_tokens=length),
    )
    if problems := config.problems():
        raise ConfigError(problems)
    return config


def import_folder(folder: Path, record: dict[str, Any], config: Config, gate: Gate | None) -> Path:
    """Writes the run's folder of an imported model; the process is a world of one. Returns the checkpoint's folder.

    Args:
        folder: the Hugging Face folder.
        record: the content of its config.json.
        config: of the imported model (`imported_config`).
        gate: what replaces the gate of a Llama.

    Raises:
        WeightsError: the folder's tensors are not those of its config.json.
        CheckpointError: the checkpoint could not be written.
    """
    reader = HuggingFaceReader(folder)
    padded = config.model.padded_vocab_size(config.model.vocab_size)
    llama = Llama.of(config, padded)
    require_tensors(reader, record, llama)
    facts = run_facts(config, fingerprint="", padded_vocab_size=padded, tokenizer_sha256="")
    facts.pop("vocabulary.tokenizer_sha256")  # unknown, so no later run is warned of another

    def write(checkpoint: Path) -> None:
        weights = checkpoint / "weights"
        weights.mkdir()
        writer = WeightsWriter(weights, "stage_000")
        for name, tensor in converted(reader, record, llama, gate):
            writer.add(name, tensor)
        writer.flush()
        write_weights_index(weights)

    out = Path(config.output_dir)
    out.mkdir(parents=True)
    try:
        published = publish(out, 0, facts, write, keep=1, is_rank_0=True)
        save_config(config, out / "config.yaml")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return published


def require_tensors(reader: HuggingFaceReader, record: dict[str, Any], llama: Llama) -> None:
    """Checks that a folder holds exactly the tensors of its config.json, in their shapes.

    Raises:
        WeightsError: the first one that does not fit.
    """
    where, wanted = reader.folder, stored_shapes(record, llama)
    found = {name: shape for name, shape in reader.shapes.items() if not name.endswith(IGNORED)}
    if llama.tied and HF_OUTPUT in found:
        if found[HF_OUTPUT] != found.get(HF_EMBEDDING) or not torch.equal(
            reader.read(HF_OUTPUT), reader.read(HF_EMBEDDING)
        ):
            raise WeightsError(
                f"{where} has tie_word_embeddings=true and an {HF_OUTPUT} that differs from {HF_EMBEDDING}; "
                "set it to false in config.json if the output layer has weights of its own"
            )
        del found[HF_OUTPUT]
    if not llama.tied and HF_OUTPUT not in found:
        raise WeightsError(
            f"{where} has tie_word_embeddings=false and no {HF_OUTPUT}; set it to true if the embedding serves as both"
        )
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise WeightsError(f"{where} lacks {name}, which its config.json needs; is a file of weights missing?")
        if name not in wanted:
            raise WeightsError(
                f"{where} holds {name}, which the model of its config.json does not have; import a dense Llama"
            )
        if found[name] != wanted[name]:
            raise WeightsError(
                f"{where} has {name} with shape {found[name]}, and its config.json makes it {wanted[name]}; correct config.json"
            )


def stored_shapes(record: dict[str, Any], llama: Llama) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a folder's tensors: without padding, without the gate that import adds, with every gate that the release holds."""
    shapes = tensor_shapes(
        replace(llama, vocab_size=record["vocab_size"], gate=llama.gate and record["model_type"] not in FOREIGN)
    )
    factor = 3 if record["model_type"] == RELEASED else 1
    return {
        name: (factor * shape[0], *shape[1:]) if name.endswith("g_proj.weight") else shape
        for name, shape in shapes.items()
    }


def converted(
    reader: HuggingFaceReader, record: dict[str, Any], llama: Llama, gate: Gate | None
) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of the training model with its name, in the model's order."""
    for name, parts in tensor_names(llama).items():
        stored = {part: reader.read(part) for part in parts if part in reader.shapes}
        if gate is Gate.open:
            stored = _with_open_gates(stored, parts, llama)
        elif record["model_type"] == RELEASED:
            stored = {part: keep_used_gates(tensor) if "g_proj" in part else tensor for part, tensor in stored.items()}
        tensor = from_hugging_face(name, stored, llama)
        yield name, _padded(tensor, llama.vocab_size) if name in (EMBEDDING, OUTPUT) else tensor


def _with_open_gates(stored: dict[str, Tensor], parts: tuple[str, ...], llama: Llama) -> dict[str, Tensor]:
    """Returns a Llama's tensors with gates of 1/2, and with an output projection that makes up for them."""
    opened = {part: 2 * tensor if part.endswith("o_proj.weight") else tensor for part, tensor in stored.items()}
    for part in parts:
        if part.endswith("g_proj.weight"):
            like = next(iter(stored.values()))
            opened[part] = like.new_zeros(llama.num_heads, llama.hidden_size)
    return opened


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """Returns a matrix with rows of 0 below it."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, rows - len(tensor)))
