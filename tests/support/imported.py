"""Imports a Hugging Face folder and runs the training model on it, in fp32 on the CPU."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ssa_pretrain.config import Config, EngineConfig, KernelImpl, LayerSpec, PrecisionConfig, PrecisionName
from ssa_pretrain.data.batches import Batch
from ssa_pretrain.engine import build_evaluator
from ssa_pretrain.huggingface.importing import import_folder, imported_config, read_record
from ssa_pretrain.huggingface.options import ImportOptions
from ssa_pretrain.parallel.state import Placement


def import_to(folder: Path, out: Path, **settings) -> Config:
    """Imports a folder with the command's settings; returns the configuration of the run's folder `out`."""
    record, options = read_record(folder), ImportOptions(out=str(out), **settings)
    config = imported_config(record, options)
    import_folder(folder, record, config, options.gate)
    return config


def training_logits(config: Config, run: Path, placement: Placement, mode: str, documents: Sequence[Tensor]) -> Tensor:
    """Returns the training model's logits [documents, padded V] after each document's last token."""
    config = replace(
        config,
        precision=PrecisionConfig(name=PrecisionName.fp32),
        engine=EngineConfig(layer_spec=LayerSpec.local),
        attention=replace(config.attention, impl=KernelImpl.reference),
    )
    model = build_evaluator(config, placement, config.model.vocab_size)
    model.load_weights(run / "checkpoints/step_00000000")
    ends = torch.tensor([0, *map(len, documents)]).cumsum(0).int()
    tokens, positions = torch.cat(list(documents)).unsqueeze(0), torch.cat([torch.arange(len(d)) for d in documents])
    batch = Batch(0, tokens, torch.zeros_like(tokens), torch.zeros_like(tokens).float(), positions, ends)
    return model.last_logits(batch, mode=mode).float()
