"""The common weights format: safetensors with canonical, unsharded names, written and read by every engine, layout and layer spec.

A folder holds `weights.json` (the schema, and every tensor's file and shape) and `*.safetensors` files of a few GB. Names are those of the
whole model under the local layer spec, with layers counted from 0 over all pipeline stages:

    embedding.word_embeddings.weight                     [padded V, M]
    decoder.layers.N.input_layernorm.weight              [M]
    decoder.layers.N.self_attention.linear_qkv.weight    [G * ((group_size + 2) * D + group_size), M], per kv head: queries, keys, values, gates
    decoder.layers.N.self_attention.linear_index.weight  [G * (J + 1) * D, M], only with a trained scorer: index queries, index key
    decoder.layers.N.self_attention.q_layernorm.weight   [D], with model.qk_norm; and k_layernorm
    decoder.layers.N.self_attention.key_convolution.weight   [G * D, 1, W], with attention.key_convolution
    decoder.layers.N.self_attention.linear_proj.weight   [M, H * D]
    decoder.layers.N.pre_mlp_layernorm.weight            [M]
    decoder.layers.N.mlp.linear_fc1.weight               [2 * F, M]: gate, then up projection
    decoder.layers.N.mlp.linear_fc2.weight               [M, F]
    decoder.final_layernorm.weight                       [M]
    output_layer.weight                                  [padded V, M], only if not tied to the embedding

It does not contain the optimizer. The checkpoint around it has the sha256 of each file; shapes are checked on reading.
"""

import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssa_pretrain.checkpoint.storage import patiently
from ssa_pretrain.errors import WeightsError
from ssa_pretrain.settings.files import leads_outside

INDEX = "weights.json"
WEIGHTS, EMA = "weights", "ema"  # folders of a checkpoint: the weights, and their running mean in fp32
SCHEMA = 1
FILE_BYTES = 4 * 2**30


def canonical_name(name: str) -> str:
    """Returns a parameter's name under the local layer spec: Transformer Engine fuses each norm into the projection after it."""
    name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    return name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


def find_weights(folder: Path) -> Path | None:
    """Returns the folder of common weights that `folder` is or contains, or None."""
    return next((place for place in (folder, folder / WEIGHTS) if (place / INDEX).is_file()), None)


def ema_weights(checkpoint: Path) -> Path:
    """Returns the folder with the running mean of a checkpoint's weights.

    Raises:
        WeightsError: the checkpoint has none.
    """
    if found := find_weights(checkpoint / EMA):
        return found
    raise WeightsError(f"{checkpoint} has no running mean of the weights; train with optim.ema_decay, such as 0.999")


class WeightsWriter:
    """Writes one process's tensors; several processes may write to one folder with different prefixes.

    Args:
        folder: exists.
        prefix: first part of the files' names.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        self.count = self.size = 0
        self.pending: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a whole tensor under its canonical name."""
        self.pending[name] = tensor.detach().cpu().contiguous()
        self.size += tensor.numel() * tensor.element_size()
        if self.size >= FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes the tensors added since the last flush to a file."""
        if self.pending:
            path = self.folder / f"{self.prefix}_{self.count:04d}.safetensors"
            patiently(lambda: self._write(path), f"writing {path}")
            self.count += 1
            self.size, self.pending = 0, {}

    def _write(self, path: Path) -> None:
        path.touch()
        mode = path.stat().st_mode  # set by the umask; safetensors replaces it by a file that only the owner may read
        try:
            save_file(self.pending, path)
        except SafetensorError as error:  # has the operating system's error as text
            if found := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
            raise
        path.chmod(mode)


def write_index(folder: Path) -> None:
    """Writes `weights.json` for the files of all writers in a folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            for name in names:
                tensors[name] = {"file": path.name, "shape": file.get_slice(name).get_shape()}
    (folder / INDEX).write_text(json.dumps({"schema": SCHEMA, "tensors": dict(sorted(tensors.items()))}, indent=1))


class WeightsReader:
    """Reads a folder of common weights tensor by tensor.

    Raises:
        WeightsError: the folder holds no common weights, has another schema, or names a file outside itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            record = json.loads((folder / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise WeightsError(f"{folder} holds no common weights ({INDEX}: {error})") from None
        if record.get("schema") != SCHEMA:
            raise WeightsError(f"{folder / INDEX} has schema {record.get('schema')}, and this version reads {SCHEMA}")
        self.tensors: dict[str, dict] = record["tensors"]
        for name in sorted({str(entry["file"]) for entry in self.tensors.values()}):
            if leads_outside(folder, name):
                raise WeightsError(
                    f"{folder / INDEX} names {name!r}, which is outside its folder; take weights only from files inside it"
                )

    def require(self, shapes: dict[str, tuple[int, ...]], *, exact: bool) -> None:
        """Checks that the folder holds a model's tensors.

        Args:
            shapes: of whole tensors, by canonical name.
            exact: whether other tensors are an error; False for one pipeline stage's part of a model.

        Raises:
            WeightsError: a tensor is missing, unexpected, or has another shape.
        """
        found = {name: tuple(entry["shape"]) for name, entry in self.tensors.items()}
        for name in sorted(shapes.keys() | found.keys() if exact else shapes):
            if shapes.get(name) != found.get(name):
                raise WeightsError(
                    f"{self.folder} holds another model: {name} is {found.get(name, 'missing')} there and "
                    f"{shapes.get(name, 'missing')} in this run; set the model as it was trained"
                )

    def read(self, name: str) -> Tensor:
        """Returns a whole tensor, on the CPU."""
        with safe_open(self.folder / self.tensors[name]["file"], framework="pt") as file:
            return file.get_tensor(name)
