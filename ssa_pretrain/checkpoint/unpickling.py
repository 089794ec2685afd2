"""Reads the pickles of a checkpoint with fixed lists of globals, so that none of them can run code of its own.

A pickle may name any function of any module (a *global*) and have it called. Torch's reader of `.metadata` and most calls of `torch.load` in
megatron-core and DeepSpeed take every global. Inside `restricted`, all of them go through an unpickler with a list:

    torch.load                       torch's own `weights_only` unpickler, whatever the caller asks for, with LOADED beside torch's list
    `.metadata`                      METADATA
    Transformer Engine's extra state EXTRA_STATE; `require_safe_extra_state` reads it before the layer does, and drops the result

The lists are what real checkpoints of both engines name; Transformer Engine's is from its source. Any other global raises `UnsafePickle`,
one sentence with the file and the global, before anything is called. The sha256 of the files is integrity.py's; it comes first and finds damage,
not malice: who can write a checkpoint can write its list. A process that writes to the folder between the check and the load is not guarded against.

Inside the block `torch.load` and the reader's `pickle` are replaced, because the libraries offer no other place. The block belongs to one thread.
"""

import io
import mmap
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from enum import EnumType
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorProperties

from ssa_pretrain.errors import UnsafePickle
from ssa_pretrain.settings.files import leads_outside

Global = tuple[str, str]  # module, name

_DCP = "torch.distributed.checkpoint.metadata"
METADATA: frozenset[Global] = frozenset(
    {
        (_DCP, "BytesStorageMetadata"),
        (_DCP, "ChunkStorageMetadata"),
        (_DCP, "Metadata"),
        (_DCP, "MetadataIndex"),
        (_DCP, "StorageMeta"),
        (_DCP, "TensorProperties"),
        (_DCP, "TensorStorageMetadata"),
        (_DCP, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("torch", "bfloat16"),
        ("torch", "float32"),
        ("torch", "uint8"),
        ("pathlib", "PosixPath"),
    }
)
LOADED: tuple[Global, ...] = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
_RECIPE = "transformer_engine.common.recipe"
EXTRA_STATE: frozenset[Global] = frozenset(
    {
        (_RECIPE, "DelayedScaling"),
        (_RECIPE, "Float8BlockScaling"),
        (_RECIPE, "Float8CurrentScaling"),
        (_RECIPE, "Format"),
        (_RECIPE, "MMParams"),
        (_RECIPE, "MXFP8BlockScaling"),
        (_RECIPE, "NVFP4BlockScaling"),
        (_RECIPE, "QParams"),
        (_RECIPE, "_FormatHelper"),
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch.storage", "_load_from_bytes"),  # calls torch.load, which is restricted too
    }
)
GETATTR: Global = ("builtins", "getattr")  # by which Python 3.11.0 to 3.11.3 pickle a member of an enum
MOVED: dict[Global, Global] = {  # what other versions of Python and core call a listed global
    ("__builtin__", "getattr"): GETATTR,
    ("pathlib._local", "PosixPath"): ("pathlib", "PosixPath"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"): ("torch.storage", "_load_from_bytes"),
}


@contextmanager
def restricted(folder: Path) -> Iterator[None]:
    """Restricts every unpickling of torch, megatron-core and DeepSpeed while the block runs.

    Args:
        folder: the checkpoint that is loaded, for messages.

    Raises:
        UnsafePickle: a file of the checkpoint names a global that no checkpoint needs.
    """
    reader: Any = filesystem
    load, unrestricted, listed = torch.load, reader.pickle, torch.serialization.get_safe_globals()
    refused: list[UnsafePickle] = []
    torch.load = _noting(refused, _restricted_load(load, folder))
    reader.pickle = SimpleNamespace(load=_noting(refused, _load_metadata), dump=pickle.dump)
    logger, was_disabled = state_dict_loader.logger, state_dict_loader.logger.disabled
    logger.disabled = True  # torch logs the trace of an error that it also raises
    torch.serialization.clear_safe_globals()  # core's list is longer than its checkpoints need
    # Torch takes a pair of a function and the name that it stands for.
    member: Any = partial(_member, str(folder)), ".".join(GETATTR)
    torch.serialization.add_safe_globals([*_present(LOADED), member])
    try:
        yield
    except CheckpointException as error:  # torch gathers the ranks' errors, and may replace them by its own
        refused += [cause for cause, _ in error.failures.values() if isinstance(cause, UnsafePickle)]
        raise (refused[0] if refused else error) from None
    finally:
        torch.load, reader.pickle, logger.disabled = load, unrestricted, was_disabled
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(listed)


def require_safe_extra_state(state: dict[str, Any], folder: Path) -> None:
    """Checks the `_extra_state` entries of a state dict, which Transformer Engine's layers unpickle when they load it.

    Raises:
        UnsafePickle: an entry names a global that no such state needs.
    """
    for name, value in state.items():
        if name.endswith("_extra_state") and isinstance(value, Tensor) and value.numel():
            content = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            _Unpickler(io.BytesIO(content), EXTRA_STATE, f"{name} in {folder}").load()


class _Unpickler(pickle.Unpickler):
    """Python's unpickler with a list of globals; `where` is the file for the message."""

    def __init__(self, file: Any, allowed: Iterable[Global], where: str) -> None:
        super().__init__(file)
        self._allowed, self._where = frozenset(allowed), where

    def find_class(self, module: str, name: str) -> Any:
        """Returns a listed global; raises UnsafePickle for any other, a dotted name included."""
        module, name = MOVED.get((module, name), (module, name))
        if (module, name) == GETATTR:
            return partial(_member, self._where)
        if (module, name) not in self._allowed:
            raise _refusal(self._where, f"{module}.{name}")
        found = super().find_class(module, name)
        return _Properties if found is TensorProperties else found


class _Properties(TensorProperties):
    """A tensor's properties as any torch wrote them. Torch 2.15 appends a field, and older versions refuse a state that is longer than theirs."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Takes what this torch knows of the state, and becomes torch's own class."""
        cast(Any, self).__class__ = TensorProperties
        self.__setstate__(state[: len(fields(TensorProperties))])


def _member(where: str, kind: Any, name: Any) -> Any:
    """Returns a member of an enum, in place of `getattr`; raises UnsafePickle for any other attribute."""
    if isinstance(kind, EnumType) and name in kind.__members__:
        return kind.__members__[name]
    raise _refusal(where, ".".join(GETATTR))


def _noting(refused: list[UnsafePickle], load: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that also notes its refusals."""

    def noting(*arguments: Any, **settings: Any) -> Any:
        try:
            return load(*arguments, **settings)
        except UnsafePickle as error:
            refused.append(error)
            raise

    return noting


def _load_metadata(file: Any) -> Any:
    """Returns torch's metadata of a checkpoint; raises UnsafePickle if it names a global, or a file outside its folder."""
    where = str(getattr(file, "name", ".metadata"))
    found = _Unpickler(file, METADATA, where).load()
    for name in {place.relative_path for place in (getattr(found, "storage_data", None) or {}).values()}:
        if leads_outside(Path(where).parent, name):
            raise UnsafePickle(f"{where} names {name}, which is outside its folder; do not use this checkpoint")
    return found


def _restricted_load(load: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """Returns torch.load with `weights_only`, whatever its caller says."""

    def restricted_load(f: Any, *arguments: Any, **settings: Any) -> Any:
        settings.pop("pickle_module", None)
        try:
            return load(f, *arguments, **settings | {"weights_only": True})
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"but got (.+)|function (.+)", str(error))
            what = next(filter(None, found.groups()), "") if found else str(error).strip().rpartition("\n")[2]
            raise _refusal(_name_of(f, folder), what) from None
        except RuntimeError as error:
            if "TorchScript" not in str(error):
                raise
            raise _refusal(_name_of(f, folder), "a TorchScript program") from None

    return restricted_load


def _refusal(where: str, what: str) -> UnsafePickle:
    return UnsafePickle(
        f"{where} names {what}, which is in no checkpoint that this project writes, so it was not unpickled; do not use this checkpoint, "
        "or start from its safetensors files with checkpoint.init_from=CHECKPOINT/weights"
    )


def _name_of(f: Any, folder: Path) -> str:
    """Returns the path of what torch.load was given; for a part of a `.distcp` file, the file of the folder that contains it."""
    if isinstance(f, str | Path):
        return str(f)
    if isinstance(f, io.BytesIO) and (part := f.getvalue()):
        for path in sorted(p for p in folder.glob("*.distcp") if p.stat().st_size >= len(part)):
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content.find(part) >= 0:
                    return str(path)
    return str(getattr(f, "name", folder))


def _present(names: Iterable[Global]) -> list[Any]:
    """Returns the globals of the packages that this process has imported: DeepSpeed only where it runs."""
    return [getattr(sys.modules[module], name) for module, name in names if module in sys.modules]
