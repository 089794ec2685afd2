"""No pickle of a checkpoint runs code: each attack works on the library, and is refused inside `restricted` with the file and the global."""

import io
import os
import pickle
import re
import struct
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorProperties

from ssa_pretrain.checkpoint.unpickling import EXTRA_STATE, METADATA, require_safe_extra_state, restricted
from ssa_pretrain.checkpoint.writer import write
from ssa_pretrain.errors import ExitCode, UnsafePickle
from ssa_pretrain.parallel import cpu_backend

SENTENCE = "which is in no checkpoint that this project writes, so it was not unpickled"


@pytest.fixture(autouse=True)
def _one_process():
    cpu_backend.install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Attack:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path, call=os.mkdir) -> None:
        self.marker, self.call = marker, call

    def __reduce__(self):
        return self.call, (str(self.marker),)


def state(extra: object = None) -> dict:
    """Returns what core saves: a tensor, an object such as a layer's extra state, and a plain value."""
    tensor = torch.arange(12.0).view(3, 4)
    return {
        "weight": ShardedTensor.from_rank_offsets("weight", tensor),
        "object": ShardedObject("object", extra, (1,), (0,)),
        "plain": {"step": 3},
    }


def save(folder: Path, extra: object = None) -> Path:
    folder.mkdir()
    write(folder, state(extra), {})
    return folder


def load(folder: Path) -> dict:
    return dist_checkpointing.load(state(), str(folder))


def test_core_checkpoint_loads(tmp_path):
    folder = save(tmp_path / "saved", torch.tensor([1, 2], dtype=torch.uint8))
    before = torch.load, torch.serialization.get_safe_globals()
    with restricted(folder):
        loaded = load(folder)
    assert torch.equal(loaded["weight"], torch.arange(12.0).view(3, 4))
    assert loaded["object"].tolist() == [1, 2]
    assert loaded["plain"] == {"step": 3}
    assert (torch.load, set(torch.serialization.get_safe_globals())) == (before[0], set(before[1]))


@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"])
def test_metadata_of_any_python_load(tmp_path, module):
    """Python 3.13 names a path's class after another module."""
    path = save(tmp_path / "saved") / ".metadata"
    content = pickle.dumps(pickle.loads(path.read_bytes()), protocol=2)  # names globals in lines
    changed, times = re.subn(rb"cpathlib(\._local)?\nPosixPath\n", b"c" + module + b"\nPosixPath\n", content)
    assert times == 1
    path.write_bytes(changed)
    with restricted(path.parent):
        assert torch.equal(load(path.parent)["weight"], torch.arange(12.0).view(3, 4))


@pytest.mark.parametrize("known", [5, None])
def test_properties_load_as_older_and_newer_versions_of_torch_wrote_them(known, tmp_path, monkeypatch):
    path = save(tmp_path / "saved") / ".metadata"
    metadata, state = pickle.loads(path.read_bytes()), TensorProperties.__getstate__
    with monkeypatch.context() as patch:
        patch.setattr(TensorProperties, "__getstate__", lambda self: (*state(self), (4, 1))[:known])
        path.write_bytes(pickle.dumps(metadata))
    with restricted(path.parent):
        assert torch.equal(load(path.parent)["weight"], torch.arange(12.0).view(3, 4))


class OldPickler(pickle.Pickler):
    """Pickles a member of an enum as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, obj):
        return (getattr, (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


def test_members_of_enums_load_as_early_python_3_11_wrote_them(tmp_path):
    path = save(tmp_path / "saved") / ".metadata"
    content = io.BytesIO()
    OldPickler(content).dump(pickle.loads(path.read_bytes()))
    assert b"getattr" in content.getvalue()
    path.write_bytes(content.getvalue())
    with restricted(path.parent):
        assert torch.equal(load(path.parent)["weight"], torch.arange(12.0).view(3, 4))


def test_members_in_a_file_of_torch_load_as_early_python_3_11_wrote_them(tmp_path):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import ZeroStageEnum

    module = SimpleNamespace(Pickler=OldPickler, __name__="pickle")
    torch.save({"stage": ZeroStageEnum.weights}, tmp_path / "file.pt", pickle_module=module)
    with restricted(tmp_path):
        assert torch.load(tmp_path / "file.pt") == {"stage": ZeroStageEnum.weights}


@pytest.mark.parametrize("name", ["__init_subclass__", "mro", "_value2member_map_", 3])
@pytest.mark.parametrize("kind", [_MEM_FORMAT_ENCODING, Metadata])
def test_no_other_attribute_is_reached_by_the_name_of_a_member(tmp_path, kind, name):
    class Reach:
        def __reduce__(self):
            return getattr, (kind, name)

    path = save(tmp_path / "saved") / ".metadata"
    path.write_bytes(pickle.dumps(Reach()))
    with pytest.raises(UnsafePickle, match=r"\.metadata names builtins\.getattr, which"), restricted(path.parent):
        load(path.parent)


def in_metadata(folder: Path, attack: object) -> Path:
    (folder / ".metadata").write_bytes(pickle.dumps(attack))
    return folder / ".metadata"


def in_object(folder: Path, attack: object) -> Path:
    """Lets the library itself write the attack, as whoever makes such a checkpoint would."""
    for path in sorted(folder.iterdir(), reverse=True):
        path.unlink()
    folder.rmdir()
    save(folder, attack)
    return next(path for path in folder.glob("*.distcp") if b"mkdir" in path.read_bytes())


@pytest.mark.parametrize("place", [in_metadata, in_object])
def test_attack_on_core_checkpoint_is_refused(tmp_path, place):
    marker = tmp_path / "attacked"
    path = place(save(tmp_path / "saved"), Attack(marker))
    with pytest.raises(UnsafePickle) as caught, restricted(path.parent):
        load(path.parent)
    assert str(caught.value).startswith(f"{path} names posix.mkdir, {SENTENCE}")
    assert (caught.value.exit_code, caught.value.of_one_rank) == (ExitCode.CHECKPOINT, True)
    assert not marker.exists()
    with suppress(CheckpointException):  # what the attack returns is no metadata
        load(path.parent)
    assert marker.is_dir(), "the attack does not work on the library, so this test shows nothing"


def test_attack_on_common_file_is_refused_even_if_the_environment_allows_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder = save(tmp_path / "saved")
    torch.save(Attack(tmp_path / "attacked"), folder / "common.pt")
    with pytest.raises(UnsafePickle, match=r"common.pt names posix.mkdir, which"), restricted(folder):
        load(folder)
    assert not (tmp_path / "attacked").exists()


def dotted(marker: Path) -> bytes:
    """Returns a pickle that reaches os.mkdir as an attribute of a listed module's own import: `filesystem`, name "os.mkdir"."""
    module, name, argument = (
        text.encode() for text in ("torch.distributed.checkpoint.filesystem", "os.mkdir", str(marker))
    )
    texts = [b"\x8c" + struct.pack("B", len(text)) + text for text in (module, name)]
    return b"\x80\x04" + b"".join(texts) + b"\x93\x8c" + struct.pack("B", len(argument)) + argument + b"\x85R."


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_metadata_that_names_a_file_outside_its_folder_is_refused(tmp_path, name):
    folder = save(tmp_path / "saved")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafePickle, match=f"names {re.escape(name)}, which is outside its folder"), restricted(folder):
        load(folder)


def test_dotted_name_of_a_listed_module_is_refused(tmp_path):
    content = dotted(tmp_path / "attacked")
    pickle.loads(content)
    assert (tmp_path / "attacked").is_dir()
    (tmp_path / "attacked").rmdir()
    folder = save(tmp_path / "saved")
    (folder / ".metadata").write_bytes(content)
    with (
        pytest.raises(UnsafePickle, match=r"names torch.distributed.checkpoint.filesystem.os.mkdir, which"),
        restricted(folder),
    ):
        load(folder)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("call", [os.system, eval, exec, __import__, numpy.fromfile, torch.load, torch.hub.load])
def test_deepspeed_file_may_not_name(tmp_path, call):
    """DeepSpeed asks for every global. What it gets is the list."""
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": torch.ones(2), "attack": Attack(tmp_path / "attacked", call)}, path)
    with pytest.raises(UnsafePickle) as caught, restricted(tmp_path):
        torch.load(path, weights_only=False)
    assert str(caught.value).startswith(f"{path} names ")
    assert call.__name__ in str(caught.value)


def test_program_of_torchscript_is_refused(tmp_path):
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(UnsafePickle, match=r"program.pt names a TorchScript program, which"), restricted(tmp_path):
        torch.load(path, weights_only=False)


def test_deepspeed_objects_load(tmp_path):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    path = tmp_path / "zero.pt"
    saved = {
        "loss_scaler": LossScaler(scale=1.0),
        "zero_stage": ZeroStageEnum(2),
        "fragment": fragment_address(numel=2, start=0),
        "shape": torch.Size([2]),
        "part": torch.ones(2, dtype=torch.bfloat16),
    }
    torch.save(saved, path)
    with restricted(tmp_path):
        found = torch.load(path, weights_only=False)
    assert found["loss_scaler"].loss_scale == 1.0
    assert (found["zero_stage"], found["fragment"], found["shape"]) == (2, saved["fragment"], (2,))


def byte_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def test_extra_state_of_a_layer_is_checked(tmp_path):
    """As Transformer Engine writes it: a pickle of tensors and plain values in a tensor of bytes."""
    good = byte_tensor(pickle.dumps({"scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}}))
    states = {"layer.weight": torch.ones(2), "layer._extra_state": good, "norm._extra_state": None}
    with restricted(tmp_path):
        require_safe_extra_state(states | {"empty._extra_state": torch.empty(0, dtype=torch.uint8)}, tmp_path)
    attack = byte_tensor(pickle.dumps({"scale_fwd": Attack(tmp_path / "attacked")}))
    with pytest.raises(UnsafePickle, match=r"layer._extra_state in .* names posix.mkdir, which"), restricted(tmp_path):
        require_safe_extra_state(states | {"layer._extra_state": attack}, tmp_path)
    inner = io.BytesIO()
    torch.save(Attack(tmp_path / "attacked"), inner)
    nested = (
        b"\x80\x04\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93"
        + pickle.BINBYTES
        + struct.pack("<I", len(inner.getvalue()))
        + inner.getvalue()
        + b"\x85R."
    )
    with pytest.raises(UnsafePickle, match=r"names posix.mkdir, which"), restricted(tmp_path):
        require_safe_extra_state({"layer._extra_state": byte_tensor(nested)}, tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_lists_hold_no_module_and_no_dotted_name():
    for module, name in METADATA | EXTRA_STATE:
        assert "." not in name
        assert module not in ("builtins", "os", "posix", "sys", "subprocess", "importlib")
