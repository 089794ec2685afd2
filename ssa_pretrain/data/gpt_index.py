"""A dataset as megatron-core's own GPTDataset reads it: blend, and the indices that it would build when training starts.

This project's training reads rows by itself (rows.py) and needs no index. For those who train with megatron-core's datasets, `gpt_datasets`
hands them the manifest's blend as it is, and keeps their indices under `cache_folder`: its name has the manifest's hash in it, so that
indices of other bytes are never met. GPTDataset itself looks only at the path and the settings, and would serve an old index for new files;
here the path is relative to the dataset's folder, so that indices outlive a move of it.

    python -m ssa_pretrain.data.gpt_index DATASET SEQUENCE_LENGTH SAMPLES HELDOUT_SAMPLES SEED

builds them on a machine without GPUs; `python -m data_prep stage=index` calls this.
"""

import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from ssa_pretrain.data.indexed_format import Manifest, file_sha256, load_manifest


@dataclass(frozen=True, slots=True)
class DatasetTokenizer:
    """What GPTDataset asks a tokenizer for, taken from the manifest."""

    eod: int
    vocab_size: int
    unique_identifiers: dict[str, Any]


class MovableGPTDataset(GPTDataset):
    """A GPTDataset whose index is known by the shard's path inside the dataset; the tokenizer's identifiers name the dataset."""

    def __init__(self, indexed_dataset: Any, dataset_path: str | None, *arguments: Any) -> None:
        super().__init__(indexed_dataset, dataset_path and "/".join(Path(dataset_path).parts[-2:]), *arguments)


def cache_folder(manifest: Manifest) -> Path:
    """Return the folder for indices of exactly this dataset."""
    return manifest.root / "cache" / file_sha256(manifest.root / "manifest.json")[:16]


def gpt_datasets(
    manifest: Manifest,
    *,
    sequence_length: int,
    samples: int,
    heldout_samples: int,
    seed: int,
    cache: Path | None = None,
) -> list[Any]:
    """Return megatron-core's train, validation and test datasets, the last None.

    Args:
        manifest: the dataset.
        sequence_length: tokens a sample.
        samples: of the train split; at least 1.
        heldout_samples: of the held-out split, which becomes the validation set; 0 for none.
        seed: of the order.
        cache: where indices are looked for and written; `cache_folder` by default.
    """
    known_by = {"class": "file", "sha256": manifest.tokenizer.sha256, "dataset": manifest.fingerprint}
    tokenizer = DatasetTokenizer(manifest.tokenizer.eos_id, manifest.tokenizer.vocab_size, known_by)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend_per_split=[manifest.blend("train"), manifest.blend("heldout") if heldout_samples else None, None],
        path_to_cache=str(cache or cache_folder(manifest)),
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    sizes = [samples, heldout_samples or None, None]
    return BlendedMegatronDatasetBuilder(MovableGPTDataset, sizes, lambda: True, config).build()  # pyright: ignore[reportArgumentType]


def build(manifest: Manifest, sequence_length: int, samples: int, heldout_samples: int, seed: int) -> tuple[Path, bool]:
    """Return the folder of the indices and whether they had to be built; folders of other manifests are removed.

    They are built in a temporary folder, and a mark says with which settings the folder is complete.
    """
    folder = cache_folder(manifest)
    for other in folder.parent.glob("*"):  # of other manifests, or left by a killed run
        if other.name != folder.name:
            shutil.rmtree(other)
    settings = f"{sequence_length} {samples} {heldout_samples} {seed}"
    mark = folder / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.done"
    if mark.is_file():
        return folder, False
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    gpt_datasets(
        manifest,
        sequence_length=sequence_length,
        samples=samples,
        heldout_samples=heldout_samples,
        seed=seed,
        cache=unfinished,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(unfinished.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(path, folder / path.name)
    unfinished.rmdir()
    mark.write_text(settings + "\n")
    return folder, True


if __name__ == "__main__":
    # Blended datasets ask for their rank before they write.
    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    made_, new = build(load_manifest(sys.argv[1]), *(int(argument) for argument in sys.argv[2:6]))
    print(f"{'built' if new else 'kept'} {made_}")
