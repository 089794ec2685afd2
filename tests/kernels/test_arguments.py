"""Every argument of every public operator: views with any strides and offset give what contiguous copies give, and bad arguments are refused.

Both implementations, forward and backward. The kernels run in Triton's interpreter, small; tests/gpu/kernels/test_arguments_gpu.py does it on a GPU,
where equal is equal to the bit. A CPU's matrix products may round by the address of their operands.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ssa_kernels
from support.errors import require_as_near
from support.kernel_impls import IMPLS

T, H, G, D, K, N, V = 10, 4, 2, 16, 2, 2, 12
ENDS = torch.tensor([0, 3, 10], dtype=torch.int32)
ROPE = {"num_kv_heads": G, "group_size": 2, "head_dim": D, "num_gates": 2}


@dataclass(frozen=True)
class Operator:
    """An operator with valid arguments."""

    call: Callable[..., Any]
    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any]
    has_impl: bool = True

    def __call__(self, how: str, **changed: Any) -> list[torch.Tensor]:
        """Returns all result tensors of an implementation."""
        impl = {"impl": how} if self.has_impl else {}
        found = self.call(**{**self.tensors, **self.settings, **impl, **changed})
        found = found if isinstance(found, tuple) else (found,)
        return [x for x in found if x is not None]


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)))


def operators() -> dict[str, Operator]:
    q, k, v, logits = draw(T, H, D), draw(T, G, D, seed=1), draw(T, G, D, seed=2), draw(T, H)
    qkv, blocks = {"q": q, "k": k, "v": v}, {"block_size": K, "top_k": N}
    indices = ssa_kernels.select_blocks(q, k, cu_seqlens=ENDS, **blocks)
    main = torch.tensor([1], dtype=torch.int32)
    rope = {"mixed": draw(T, G * (4 * D + 2)), "angles": 9 * draw(7, D), "positions": torch.arange(T) * 3 % 7}
    output = {"hidden": draw(T, D), "weight": draw(V, D), "labels": torch.tensor([0, 11, -100, 3, 4, 4, -100, 7, 8, 1])}
    lse = {"lse_full": draw(T, H), "lse_sparse": draw(T, H, seed=3)}
    return {
        "select_blocks": Operator(ssa_kernels.select_blocks, {"q": q, "k": k, "cu_seqlens": ENDS}, blocks),
        "sparse_attention": Operator(
            ssa_kernels.sparse_attention, {**qkv, "indices": indices, "cu_seqlens": ENDS}, {"block_size": K}
        ),
        "full_attention": Operator(ssa_kernels.full_attention, {**qkv, "cu_seqlens": ENDS}, {"return_lse": True}),
        "gate_and_align": Operator(
            ssa_kernels.gate_and_align,
            {"o_full": q, "o_sparse": draw(T, H, D, seed=4), "gate_logits": logits, "main": main},
            {},
        ),
        "ssa_attention": Operator(
            ssa_kernels.ssa_attention, {**qkv, "gate_logits": logits, "cu_seqlens": ENDS, "main": main}, blocks
        ),
        "window_attention": Operator(ssa_kernels.window_attention, {**qkv, "cu_seqlens": ENDS}, {"window": 3}),
        "compressed_attention": Operator(
            ssa_kernels.compressed_attention, {**qkv, "cu_seqlens": ENDS}, {"block_size": K}
        ),
        "gate": Operator(ssa_kernels.gate, {"o": q, "gate_logits": logits}, {}),
        "swiglu": Operator(ssa_kernels.swiglu, {"x": draw(T, 2, 12)}, {}),
        "qkv_rope": Operator(ssa_kernels.qkv_rope, rope, ROPE),
        "rope": Operator(ssa_kernels.rope, {"x": k, "angles": rope["angles"], "positions": rope["positions"]}, {}),
        "key_convolution": Operator(
            ssa_kernels.key_convolution, {"k": k, "weight": draw(G * D, 1, 3), "positions": rope["positions"]}, {}
        ),
        "linear_cross_entropy": Operator(ssa_kernels.linear_cross_entropy, output, {}),
        "captured_mass": Operator(ssa_kernels.captured_mass, lse, {}, has_impl=False),
    }


OPERATORS = operators()
DIFFERENTIABLE = {"q", "k", "v", "o", "o_full", "o_sparse", "gate_logits", "x", "mixed", "hidden", "weight"}


# Views of a tensor's values with another layout in memory.
def spread(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns a view of every second element along a dim of a larger tensor."""
    wide = torch.zeros([n * 2 if i == dim else n for i, n in enumerate(x.shape)], dtype=x.dtype)
    part = wide[(slice(None),) * dim + (slice(1, None, 2),)]
    return part.copy_(x)


def turned(x: torch.Tensor) -> torch.Tensor:
    """Returns a copy whose dims are in reverse order in memory."""
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def moved(x: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous copy that begins one element past an aligned address."""
    return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def part_of_wider(x: torch.Tensor) -> torch.Tensor:
    """Returns a slice of the last dim of a wider tensor, as in the split of a projection."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
    return wide[..., 2:-1].copy_(x)


VIEWS = {
    "as it is": lambda x: x.clone(),
    "rows apart": lambda x: spread(x, 0),
    "elements apart": lambda x: spread(x, x.dim() - 1),
    "turned": turned,
    "moved": moved,
    "part of wider": part_of_wider,
}
GRADIENTS = {**VIEWS, "one number": lambda x: torch.ones((), dtype=x.dtype).expand(x.shape)}


def results(operator: Operator, impl: str, tensors: dict[str, torch.Tensor], view_grad: Callable) -> list[torch.Tensor]:
    """Returns outputs and the gradients of all differentiable inputs."""
    leaves = {n: x.detach() for n, x in tensors.items()}
    wanted = {n: x.requires_grad_() for n, x in leaves.items() if n in DIFFERENTIABLE}
    out = operator(impl, **leaves)
    through = [x for x in out if x.requires_grad]
    if not through:
        return out
    upstream = [(view_grad(draw(*x.shape, seed=9)) if x.dim() else torch.tensor(3.0)).to(x.dtype) for x in through]
    grads = torch.autograd.grad(through, list(wanted.values()), upstream)
    assert all(g.shape == x.shape and g.dtype == x.dtype for g, x in zip(grads, wanted.values(), strict=True))
    return [*(x.detach() for x in out), *grads]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPERATORS)
def test_view_gives_what_its_contiguous_copy_gives(name, impl):
    operator = OPERATORS[name]
    doubled = {n: x.double() if n in DIFFERENTIABLE else x for n, x in operator.tensors.items()}
    exact, exact_of_ones = (results(operator, "reference", doubled, view) for view in (lambda x: x, torch.ones_like))
    views = st.fixed_dictionaries({n: st.sampled_from(list(VIEWS)) for n in operator.tensors})

    @settings(max_examples=12 if impl == "reference" else 4, deadline=None, derandomize=True, database=None)
    @given(views, st.sampled_from(list(GRADIENTS)))
    def check(kinds, kind_of_grad):
        viewed = {n: VIEWS[kinds[n]](x) for n, x in operator.tensors.items()}
        plain = {n: x.contiguous().clone() for n, x in viewed.items()}
        found = results(operator, impl, viewed, GRADIENTS[kind_of_grad])
        wanted = results(operator, impl, plain, lambda x: GRADIENTS[kind_of_grad](x).contiguous().clone())
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            if not torch.equal(one, other):
                assert one.is_floating_point(), (i, one, other)
                right = (exact_of_ones if kind_of_grad == "one number" else exact)[i]
                part = right.isfinite()
                assert torch.equal(one[~part], other[~part]), (i, one, other)
                require_as_near(one[part], other[part], right[part], factor=2.0, floor=2**-22, name=f"result {i}")

    check()


# Wrong arguments: (argument, what is wrong with it, the value) of an operator. Both implementations refuse each with the same message.
NUMBERS = {
    "block_size": (0, -1, True, 2.0, "16", None),
    "top_k": (0, -1, True, 2.0, "16", None),
    "window": (0, -1, True, 2.0, "16", None),
    "scale": (float("nan"), float("inf"), "1", True, torch.tensor(1.0)),
    "score": ("softmax", None, 1),
    "num_rows": (0, -1, True, 2.0, 3),
    "backend": ("fast", "cudnn", 1),
    "weights": (1.0, (1.0,), (1.0, float("nan")), (1.0, "1"), "ab", None),
    "main": ("both", None, 1, True, torch.tensor([1, 0]), torch.tensor(1.0), torch.tensor(1, device="meta")),
    "impl": ("fast", 1),
    "num_kv_heads": (0, True, 2.0, 3),
    "group_size": (0, -1, True, 2.0, 3),
    "head_dim": (0, 15, True, 16.0, 18),
    "num_gates": (-1, True, 2.0, 3),
}
TAKES = {
    "select_blocks": ("block_size", "top_k", "scale", "score", "impl"),
    "sparse_attention": ("block_size", "scale", "impl"),
    "window_attention": ("window", "scale", "impl"),
    "compressed_attention": ("block_size", "scale", "impl"),
    "full_attention": ("scale", "num_rows", "backend", "impl"),
    "gate_and_align": ("main", "weights", "impl"),
    "ssa_attention": ("block_size", "top_k", "scale", "score", "num_rows", "main", "weights", "impl"),
    "gate": ("impl",),
    "swiglu": ("impl",),
    "qkv_rope": ("num_kv_heads", "group_size", "head_dim", "num_gates", "impl"),
    "rope": ("impl",),
    "key_convolution": ("impl",),
    "linear_cross_entropy": ("impl",),
    "captured_mass": (),
}


def bad_tensors(name: str, x: torch.Tensor):
    """Yields (what is wrong, tensor) for one tensor argument."""
    yield "a list", x.tolist()
    yield "None", None
    yield "sparse", x.to_sparse()
    yield "on another device", x.to("meta")
    yield "complex", x.to(torch.complex64)
    yield "bool", x.bool() if name != "main" else x.double()
    if x.is_floating_point():
        yield "integers", x.long()
        yield "float16", x.half() if name not in SINGLE else x.to(torch.int8)
    else:
        yield "floats", x.float()
        yield "bytes", x.to(torch.uint8) if name != "main" else torch.cat([x, x])
    if name != "x":
        yield "one dim more", x[None] if name != "main" else x.float()
    for dim in range(x.dim() if name != "x" else 0):
        if dim not in FREE.get(name, ()):
            yield f"longer in dim {dim}", torch.cat([x, x.narrow(dim, 0, 1)], dim)
            yield f"shorter in dim {dim}", x.narrow(dim, 0, x.shape[dim] - 1)
        yield f"empty in dim {dim}", x.narrow(dim, 0, 0)


# No other argument has to share their dtype, so any dtype fits.
SINGLE = {"x", "mixed", "o"}
# Sizes that may be others: a shorter table of angles has its own test, cu_seqlens hold any number of documents, indices any number of blocks.
FREE = {
    "x": {0, 1},
    "o": {2},
    "cu_seqlens": {0},
    "indices": {2},
    "angles": {0, 1},
    "weight": {0},
    "main": {0},
}
FITS = {
    ("ssa_attention", "gate_logits", "None"),  # no gate
    ("select_blocks", "k", "shorter in dim 1"),  # one kv head
    ("key_convolution", "k", "float16"),  # the filters may be float32
    ("key_convolution", "weight", "longer in dim 2"),  # other widths
    ("key_convolution", "weight", "shorter in dim 2"),
}


def refusal(operator: Operator, how: str, **changed: Any) -> str | None:
    """Returns the message of the ValueError that the arguments raise, or None."""
    try:
        operator(how, **changed)
    except ValueError as error:
        return str(error)
    return None


def refusal_faults(operator: Operator, argument: str, what: object, wrong: object) -> list[tuple]:
    """Returns what is wrong with an argument's refusal: accepted, different messages, or a message without its name."""
    sentences = [refusal(operator, impl, **{argument: wrong}) for impl in IMPLS]
    if sentences[0] is None:
        return [(argument, what, "is accepted")]
    same = len(set(sentences)) == 1 and argument in sentences[0]
    return [] if same else [(argument, what, sentences)]


@pytest.mark.parametrize("name", OPERATORS)
def test_bad_tensor_gets_the_same_message_from_both_implementations(name):
    found = []
    for argument, x in OPERATORS[name].tensors.items():
        for what, wrong in bad_tensors(argument, x):
            if (name, argument, what) not in FITS:
                found += refusal_faults(OPERATORS[name], argument, what, wrong)
    assert not found


@pytest.mark.parametrize("name", OPERATORS)
def test_bad_number_gets_the_same_message_from_both_implementations(name):
    found = []
    for argument in TAKES[name]:
        for wrong in NUMBERS[argument]:
            found += refusal_faults(OPERATORS[name], argument, wrong, wrong)
    assert not found
