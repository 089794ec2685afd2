"""The safetensors files of a Hugging Face folder: what each holds, how several processes write them, and how they are read.

A folder has either `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with `model.safetensors.index.json`, which names
each tensor's file. Files are planned before anything is written, from names and shapes alone, so every process knows the whole plan, and
process r writes the files r, r + world_size, … No process holds more than one file's tensors at a time.

Torch's `HuggingFaceStorageWriter` is not used. Its distributed mode writes pieces of tensors that a second pass must put together, and it needs
each process's share in memory at once; our checkpoints hold whole tensors, which are only renamed and split.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssa_pretrain.errors import WeightsError
from ssa_pretrain.huggingface.weights import Llama, tensor_names, tensor_shapes, to_hugging_face

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def plan_files(llama: Llama, item_bytes: int, max_bytes: int) -> dict[str, list[str]]:
    """Returns the files of an export: name -> tensors of the training model whose parts it holds, in the model's order.

    Args:
        llama: the model's sizes.
        item_bytes: bytes per number.
        max_bytes: of a file; only a tensor that is larger by itself exceeds it.
    """
    shapes, groups, size = tensor_shapes(llama), [[]], 0
    for name, parts in tensor_names(llama).items():
        added = sum(math.prod(shapes[part]) for part in parts) * item_bytes
        if groups[-1] and size + added > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += added
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_file(
    path: Path, names: Sequence[str], read: Callable[[str], Tensor], llama: Llama, dtype: torch.dtype
) -> None:
    """Writes one file of an export.

    Args:
        path: of the file.
        names: the tensors of the training model that it holds.
        read: returns one of them, whole.
        llama: the model's sizes.
        dtype: of the written tensors.
    """
    tensors = {}
    for name in names:
        parts = to_hugging_face(name, read(name).to(dtype), llama)
        tensors |= {part: tensor.contiguous() for part, tensor in parts.items()}
    path.touch()
    mode = path.stat().st_mode  # set by the umask; safetensors replaces it by a file that only the owner may read
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_index(folder: Path, files: dict[str, list[str]], llama: Llama, item_bytes: int) -> None:
    """Writes the index of a planned export; one file needs none."""
    if SINGLE in files:
        return
    parts, shapes = tensor_names(llama), tensor_shapes(llama)
    found = {part: file for file, names in files.items() for name in names for part in parts[name]}
    total = sum(math.prod(shape) for shape in shapes.values())
    record = {
        "metadata": {"total_parameters": total, "total_size": total * item_bytes},
        "weight_map": dict(sorted(found.items())),
    }
    (folder / INDEX).write_text(json.dumps(record, indent=2) + "\n")


class HuggingFaceReader:
    """Reads the tensors of a Hugging Face folder one by one.

    Raises:
        WeightsError: the folder has no safetensors, a listed file is missing or damaged, or a tensor is not where the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = dict(self._listed())
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self.files.values())):
            self._read_header(file)
        if lost := sorted(name for name in self.files if name not in self.shapes):
            raise WeightsError(
                f"{folder / self.files[lost[0]]} lacks {lost[0]}, which {INDEX} lists; copy the folder again"
            )

    def read(self, name: str) -> Tensor:
        """Returns a tensor, on the CPU."""
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def _listed(self) -> Iterator[tuple[str, str]]:
        """Yields each tensor with its file."""
        index = self.folder / INDEX
        if index.is_file():
            try:
                yield from json.loads(index.read_text())["weight_map"].items()
            except (ValueError, KeyError, AttributeError) as error:
                raise WeightsError(f"{index} cannot be read ({error}); copy the folder again") from None
            return
        if not (self.folder / SINGLE).is_file():
            pickled = any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pth"))
            hint = "save it again with transformers' save_pretrained" if pickled else "give the folder of config.json"
            raise WeightsError(f"{self.folder} has neither {SINGLE} nor {INDEX}; {hint}")
        with self._open(SINGLE) as file:
            yield from ((name, SINGLE) for name in file.keys())  # noqa: SIM118

    def _read_header(self, file: str) -> None:
        """Notes the shapes of a file's tensors."""
        with self._open(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                self.files.setdefault(name, file)
                self.shapes[name] = tuple(opened.get_slice(name).get_shape())

    def _open(self, file: str):
        path = self.folder / file
        if not path.is_file():
            raise WeightsError(f"{path} is missing, and {INDEX} lists it; copy the folder again")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is damaged ({error}); copy the folder again") from None
