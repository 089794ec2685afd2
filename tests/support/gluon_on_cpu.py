"""Runs Gluon kernels under Triton's interpreter: their modules get a `gluon` built from triton.language.

Triton's interpreter knows only triton.language. Gluon is the same language with layouts, and layouts do not change values. So here a layout
is None, converting one is the identity, and the inline instructions of fragments.py are emulated. This checks everything about values:
addresses, masks, loops, and the permutations by which fragments.py names registers. It cannot check that each lane holds what the
instruction expects. The compiler checks that: every conversion is asserted trivial.
"""

import importlib
import sys
import types

import numpy as np
import pytest
import triton
import triton.experimental
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

MODULES = ("fragments", "query", "segment", "forward", "backward", "few_heads", "wide_heads", "launch")


def load():
    """Returns tensor_core/launch.py, imported again on top of the stand-in, with everything that it imports."""
    gl = _language()
    gluon = types.ModuleType("triton.experimental.gluon")
    gluon.jit, gluon.constexpr_function, gluon.language = _jit, lambda function: function, gl
    ampere = types.ModuleType("triton.experimental.gluon.language.nvidia.ampere")
    ampere.mma_v2 = lambda a, b, acc: tl.dot(a, b, acc)
    ampere.async_copy = types.SimpleNamespace(
        async_copy_global_to_shared=_copy, commit_group=lambda: None, wait_group=lambda outstanding: None
    )
    names = [f"ssa_kernels.sparse_attention.tensor_core.{name}" for name in MODULES]
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.experimental, "gluon", gluon, raising=False)
        for module in (gluon, gl, types.ModuleType("triton.experimental.gluon.language.nvidia"), ampere):
            patch.setitem(sys.modules, module.__name__, module)
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        for name in names:
            module = importlib.import_module(name)
            module.tl = tl  # the interpreter patches the triton.language in a kernel's globals
            found.append(module)
        for name in names:
            del sys.modules[name]
    return found[-1]


def _jit(function=None, **options):
    """Returns triton.jit of a function. The interpreter recompiles kernels, and then recognises constexpr parameters only by the text "tl.constexpr"."""
    if function is None:
        return lambda f: _jit(f, **options)
    kernel = triton.jit(function, **options)
    kernel.rewrite().__annotations__ = dict.fromkeys(function.__annotations__, "tl.constexpr")
    return kernel


def _language():
    gl = types.ModuleType("triton.experimental.gluon.language")
    for name in ["constexpr", "dtype", "int16", "int32", "int64", "float16", "bfloat16", "float32"]:
        setattr(gl, name, getattr(tl, name))
    for name in [
        "load",
        "store",
        "where",
        "maximum",
        "minimum",
        "exp2",
        "log2",
        "sum",
        "max",
        "reshape",
        "permute",
        "join",
        "split",
        "program_id",
    ]:
        setattr(gl, name, _late(name))
    for name in [
        "SliceLayout",
        "BlockedLayout",
        "DistributedLinearLayout",
        "DotOperandLayout",
        "SwizzledSharedLayout",
        "NVMMADistributedLayout",
    ]:
        setattr(gl, name, lambda *args, **kwargs: None)
    gl.arange = lambda first, end, layout: tl.arange(tl.constexpr(first), tl.constexpr(getattr(end, "value", end)))
    gl.zeros = lambda shape, dtype, layout: tl.zeros(shape, dtype)
    gl.full = lambda shape, value, dtype, layout: tl.full(shape, value, dtype)
    gl.convert_layout = lambda x, layout, assert_trivial=False: x
    gl.num_warps = lambda: 1
    gl.static_range = range
    gl.allocate_shared_memory = lambda dtype, shape, layout: _Shared([None] * int(shape[0]))
    gl.inline_asm_elementwise = _instruction
    return gl


def _late(name):
    """Returns a function of triton.language that is looked up at each call: the interpreter patches the module while a kernel runs."""
    return lambda *args, **kwargs: getattr(tl, name)(*args, **kwargs)


class _Shared:
    """A ring of buffers. A copy lands immediately, so overwriting a buffer before it was read changes the results."""

    def __init__(self, buffers, at=None, transposed=False):
        self.buffers, self.at, self.transposed = buffers, at, transposed

    def index(self, i):
        return _Shared(self.buffers, int(i))

    def permute(self, order):
        return _Shared(self.buffers, self.at, not self.transposed)

    def store(self, x):
        self.buffers[self.at] = x

    def load(self, layout):
        x = self.buffers[self.at]
        return tl.trans(x) if self.transposed else x


def _copy(shared, pointers, mask=None):
    shared.store(tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0))


def _instruction(asm, constraints, args, dtype, is_pure, pack):
    words = args[0]
    if asm.startswith("mov.b32 $0"):
        return (args[0].to(tl.int32) & 0xFFFF) | (args[1].to(tl.int32) << 16)
    if asm.startswith("mov.b32 {"):
        return (words & 0xFFFF).to(tl.int16), (words >> 16).to(tl.int16)
    assert asm.startswith("movmatrix.sync.aligned.m8n8.trans.b16"), asm
    # A register of the warp holds words (row 8 b + i, column 8 a + 2 j and the next): an 8 x 8 matrix; the instruction transposes it.
    rows, count = words.handle.data.shape
    elements = np.ascontiguousarray(words.handle.data).view(np.uint16).reshape(rows // 8, 8, count // 4, 8)
    turned = np.ascontiguousarray(elements.transpose(0, 3, 2, 1)).reshape(rows, 2 * count).view(np.int32)
    return tl.core.tensor(TensorHandle(turned, words.handle.dtype), words.type)
