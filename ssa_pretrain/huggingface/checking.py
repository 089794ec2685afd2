"""Loads an export with transformers and compares its logits with the training model's, in fp32 and in both modes.

Both models get the weights as the export holds them: the training model loads the checkpoint's, rounded to the export's number format. What differs
then is only the code, and rounding in fp32. The inputs are random tokens in documents of several lengths: around a block, and longer than all chosen
blocks together. transformers gets them as one batch with padding on the left, the training model as packed documents; the last token's logits of
each are compared.

In sparse mode two blocks can be so nearly equal that fp32 rounding decides between them. Then the logits of that document and no other move by
the weight of such a block. So in sparse mode most documents must agree, in full mode all.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssa_pretrain.checkpoint.weights import WeightsReader, WeightsWriter, write_index
from ssa_pretrain.config import (
    Config,
    EngineConfig,
    KernelImpl,
    LayerSpec,
    ParallelConfig,
    PrecisionConfig,
    PrecisionName,
)
from ssa_pretrain.data.batches import Batch
from ssa_pretrain.engine import build_evaluator
from ssa_pretrain.errors import CheckpointError
from ssa_pretrain.huggingface.multipliers import fold, unfold
from ssa_pretrain.huggingface.settings import Mode
from ssa_pretrain.parallel.state import Placement

TOLERANCE = 1e-5  # relative error of a document's logits, about a hundred roundings in fp32
TIES = 0.34  # share of documents in which near-equal blocks may have changed places


def check_export(folder: Path, config: Config, weights: WeightsReader, dtype: torch.dtype, placement: Placement) -> str:
    """Returns one line with the largest relative errors of the logits.

    Args:
        folder: the export.
        config: the run.
        weights: the checkpoint's.
        dtype: of the export.
        placement: of this process, the only one.

    Raises:
        CheckpointError: transformers is missing, or the logits differ.
    """
    documents = random_documents(config, weights.tensors["embedding.word_embeddings.weight"]["shape"][0])
    ours = training_logits(config, weights, dtype, placement, documents)
    words = []
    for mode in Mode:
        theirs = exported_logits(folder, mode, documents, placement.device)
        errors = [float((a - b).norm() / a.norm()) for a, b in zip(ours[mode], theirs, strict=True)]
        allowed = int(TIES * len(errors)) if mode is Mode.sparse else 0
        if sum(not error <= TOLERANCE for error in errors) > allowed:
            listed = ", ".join(f"{len(d)} tokens: {e:.1e}" for d, e in zip(documents, errors, strict=True))
            raise CheckpointError(
                f"{folder} gives other logits than the training model in {mode.value} mode, by a relative error above {TOLERANCE} ({listed}); "
                "do not publish it, and report this as a bug"
            )
        words.append(f"{mode.value} {max(errors):.1e}")
    return f"checked: relative errors of the logits of {len(documents)} documents in fp32: {', '.join(words)}"


def random_documents(config: Config, vocab_size: int) -> list[list[int]]:
    """Returns documents of random tokens, none longer than the run's rows."""
    a, longest = config.attention, config.data.sequence_length
    covered = a.block_size * a.top_k
    lengths = (1, a.block_size - 1, a.block_size, a.block_size + 1, 2 * covered + 1, 3 * covered - 1, 4 * covered + 7)
    generator = torch.Generator().manual_seed(config.seed)
    sizes = sorted({min(length, longest) for length in lengths})
    return [torch.randint(vocab_size, (size,), generator=generator).tolist() for size in sizes]


def training_logits(
    config: Config, weights: WeightsReader, dtype: torch.dtype, placement: Placement, documents: list[list[int]]
) -> dict[Mode, Tensor]:
    """Returns the training model's logits after each document's last token, float32 [documents, V] on the CPU, by mode."""
    config = replace(
        config,
        parallel=ParallelConfig(),
        precision=PrecisionConfig(name=PrecisionName.fp32),
        engine=EngineConfig(layer_spec=LayerSpec.local),
        attention=replace(config.attention, impl=KernelImpl.reference),
    )
    model = build_evaluator(config, placement, weights.tensors["embedding.word_embeddings.weight"]["shape"][0])
    with tempfile.TemporaryDirectory() as scratch:
        writer = WeightsWriter(Path(scratch), "rounded")
        for name in weights.tensors:
            rounded = fold(name, weights.read(name), config).to(dtype).float()  # as the folder holds it
            writer.add(name, unfold(name, rounded, config))
        writer.flush()
        write_index(Path(scratch))
        model.load_weights(Path(scratch))
    batch = _packed(documents)
    return {mode: model.last_logits(batch, mode=mode.value).float().cpu() for mode in Mode}


@torch.no_grad()
def exported_logits(folder: Path, mode: Mode, documents: list[list[int]], device: torch.device) -> Tensor:
    """Returns the export's logits after each document's last token in a mode, float32 [documents, V] on the CPU, computed on a device."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise CheckpointError(
            f"check=true needs transformers ({error}); pip install -e '.[huggingface]', or leave it out"
        ) from None

    settings = {"trust_remote_code": True, "dtype": torch.float32, "attention_mode": mode.value}
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), **settings)
    model.to(device).eval()
    longest = max(map(len, documents))
    tokens, mask = torch.zeros(2, len(documents), longest, dtype=torch.int64)
    for row, document in enumerate(documents):
        tokens[row, -len(document) :], mask[row, -len(document) :] = torch.tensor(document), 1
    return model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits[:, -1].float().cpu()


def _packed(documents: list[list[int]]) -> Batch:
    """Returns the documents as one microbatch without labels."""
    tokens = torch.tensor([token for document in documents for token in document])
    ends = torch.tensor([0, *map(len, documents)]).cumsum(0).int()
    empty = torch.zeros_like(tokens).unsqueeze(0)
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    return Batch(0, tokens.unsqueeze(0), empty, empty.float(), positions, ends)
