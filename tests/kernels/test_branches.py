"""NSA's branches against float64: the window, the compressed branch, the gated sum and the compressed branch's score; references and Triton kernels.

The kernels run in Triton's interpreter, small, and are compiled for Hopper without a GPU. Errors are relative in the norm: float32 to sums of at most
a few hundred terms; float16 beside the reference's, which rounds p, ds and results once as the kernels do.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssa_kernels import (
    build_layout,
    compressed_attention,
    gated_sum,
    query_slice,
    query_spans,
    select_blocks,
    window_attention,
)
from support import oracle
from support.errors import relative, require_as_near
from support.kernel_impls import IMPLS
from support.rounded_attention import rounded_attention

FLOAT32 = 3e-6
DOCUMENTS = [0, 1, 18, 18, 60, 63]
BLOCK = 8


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Makes torch.empty return NaN, so that every element that a kernel does not write is visible."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def exact_compressed(q, k, v, cu_seqlens, block_size, scale):
    """Returns (o, lse) in float64, query by query from the definition; differentiable."""
    group, outs, lses = q.shape[1] // k.shape[1], [], []
    for token, (start, _) in enumerate(oracle.where(cu_seqlens, k.shape[0])):
        count = (token - start + 1) // block_size
        if not count:
            outs.append(torch.zeros(q.shape[1:], dtype=torch.float64))
            lses.append(torch.full(q.shape[1:2], -math.inf, dtype=torch.float64))
            continue
        blocks = slice(start, start + count * block_size)
        means = [x[blocks].double().unflatten(0, (count, block_size)).mean(1).to(x.dtype).double() for x in (k, v)]
        mean_k, mean_v = (x.repeat_interleave(group, 1) for x in means)
        logits = torch.einsum("hd,chd->hc", q[token].double(), mean_k) * scale
        lses.append(logits.logsumexp(1))
        outs.append(torch.einsum("hc,chd->hd", logits.softmax(1), mean_v))
    return torch.stack(outs), torch.stack(lses).detach()


def window_mask(tokens, cu_seqlens, window):
    """Returns bool [tokens, tokens]: the keys that a query sees."""
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for token, (start, _) in enumerate(oracle.where(cu_seqlens, tokens)):
        mask[token, max(start, token - window + 1) : token + 1] = True
    return mask


def exact_window(q, k, v, cu_seqlens, window, scale):
    """Returns (o, lse) in float64 by a dense mask; differentiable."""
    return oracle.attention(q, k, v, window_mask(len(k), cu_seqlens, window).expand(q.shape[1], -1, -1), scale)


def draw(heads, kv_heads, head_dim, dtype, tokens=DOCUMENTS[-1] + 2):
    """Returns q, k, v and the gradient of o; two tokens lie past the last boundary."""
    generator = torch.Generator().manual_seed(heads * head_dim)
    shapes = [(tokens, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def results(attend, q, k, v, do):
    """Returns o, lse, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, lse = attend(*leaves)
    return [o.detach(), lse, *torch.autograd.grad(o, leaves, do.to(o.dtype))]


def branch(name, impl, window=5, layout=None):
    """Returns the operator under test and its float64 counterpart: functions of q, k, v."""
    ends = torch.tensor(DOCUMENTS, dtype=torch.int32) if layout is None else layout
    if name == "window":
        return (
            lambda *qkv: window_attention(*qkv, window=window, cu_seqlens=ends, impl=impl),
            lambda *qkv: exact_window(*qkv, DOCUMENTS, window, qkv[0].shape[-1] ** -0.5),
        )
    return (
        lambda *qkv: compressed_attention(*qkv, block_size=BLOCK, cu_seqlens=ends, impl=impl),
        lambda *qkv: exact_compressed(*qkv, DOCUMENTS, BLOCK, qkv[0].shape[-1] ** -0.5),
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["window", "compressed"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [(4, 2, 16, torch.float32), (3, 1, 24, torch.float32), (2, 2, 16, torch.float16)],
)
def test_branch_is_as_near_to_float64_as_the_reference(impl, name, heads, kv_heads, head_dim, dtype):
    inputs = draw(heads, kv_heads, head_dim, dtype)
    ours, exact_branch = branch(name, impl)
    found, reference = results(ours, *inputs), results(branch(name, "reference")[0], *inputs)
    # Means are rounded to the dtype in both; the exact result differentiates the rounding as the identity.
    exact = results(exact_branch, *(inputs if dtype == torch.float32 else [x.double() for x in inputs]))
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(found[1].double(), exact[1].double(), rtol=tolerance, atol=tolerance)
    for label, got, own, right in zip(("o", "lse", "dq", "dk", "dv"), found, reference, exact, strict=True):
        if label == "lse":
            continue
        if dtype == torch.float32:
            assert relative(got, right) < FLOAT32, label
        else:
            require_as_near(got, own, right, factor=1.5, name=label)


@pytest.mark.parametrize("impl", IMPLS)
def test_window_rounds_no_more_than_a_fused_kernel_must(impl):
    """The baseline of the GPU's tests: p, ds, o and the gradients are rounded once, and delta is of the rounded o."""
    q, k, v, do = draw(4, 4, 32, torch.float16)
    ours, exact_branch = branch("window", impl)
    o, _, *grads = results(ours, q, k, v, do)
    exact_o, _, *exact = results(exact_branch, *(x.double() for x in (q, k, v)), do)
    baseline = rounded_attention(q, k, v, do, window_mask(len(k), DOCUMENTS, 5), 32**-0.5)
    for label, got, low, right in zip(("o", "dq", "dk", "dv"), (o, *grads), baseline, (exact_o, *exact), strict=True):
        require_as_near(got, low.to(q.dtype), right, factor=1.1, name=label)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["window", "compressed"])
def test_some_of_the_queries_get_what_all_get(impl, name):
    """As under context parallelism: spans of queries over all keys. Gradients of the spans sum to the whole's."""
    q, k, v, do = draw(4, 2, 16, torch.float32)
    tokens = len(k)
    whole = results(branch(name, impl)[0], q, k, v, do)
    layout = build_layout(torch.tensor(DOCUMENTS, dtype=torch.int32), num_tokens=tokens, block_size=BLOCK)
    parts = [[(0, 10), (40, 25)], [(10, 30)]]
    dk = dv = 0
    for spans in parts:
        chosen = torch.cat([torch.arange(first, first + length) for first, length in spans])
        some = query_spans(layout, spans)
        found = results(branch(name, impl, layout=some)[0], q[chosen], k, v, do[chosen])
        for got, wanted in zip(found[:3], whole[:3], strict=True):
            torch.testing.assert_close(got, wanted[chosen], rtol=1e-5, atol=1e-6)
        dk, dv = dk + found[3], dv + found[4]
    assert relative(dk, whole[3]) < FLOAT32
    assert relative(dv, whole[4]) < FLOAT32
    scattered = torch.tensor([3, 17, 50, 64])
    found = results(branch(name, impl, layout=query_slice(layout, scattered))[0], q[scattered], k, v, do[scattered])
    torch.testing.assert_close(found[0], whole[0][scattered], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["window", "compressed"])
def test_documents_are_isolated_and_the_future_is_not_read(impl, name):
    q, k, v, _ = draw(4, 2, 16, torch.float32)
    attend, _ = branch(name, impl)
    before, _ = attend(q, k, v)
    for place, unchanged in ((40, [*range(40), *range(60, 65)]), (17, [*range(17), *range(18, 65)])):
        k_new, v_new = k.clone(), v.clone()
        k_new[place] += 3.0
        v_new[place] -= 2.0
        after, _ = attend(q, k_new, v_new)
        assert torch.equal(after[unchanged], before[unchanged])
        if name == "window":  # 5 keys, its own included; token 17 is its document's last
            changed = (after != before).flatten(1).any(1).nonzero().flatten().tolist()
            assert changed == ([40, 41, 42, 43, 44] if place == 40 else [17])
        elif place == 40:  # in block 2 of the document from 18 on, complete at token 41
            changed = (after != before).flatten(1).any(1).nonzero().flatten().tolist()
            assert changed == list(range(41, 60))


@pytest.mark.parametrize("impl", IMPLS)
def test_queries_before_the_first_complete_block_see_nothing(impl):
    q, k, v, do = draw(4, 2, 16, torch.float32, tokens=BLOCK - 1)
    ends = torch.tensor([0, 3, BLOCK - 1], dtype=torch.int32)
    o, lse, *grads = results(
        lambda *qkv: compressed_attention(*qkv, block_size=BLOCK, cu_seqlens=ends, impl=impl), q, k, v, do
    )
    assert not o.any()
    assert (lse == -math.inf).all()
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_window_of_a_whole_document_is_full_attention(impl):
    q, k, v, _ = draw(4, 2, 16, torch.float32)
    wide, exact = branch("window", impl, window=10**12)
    full = oracle.attention(*(x.double() for x in (q, k, v)), oracle.visible(None, DOCUMENTS, len(q), 4, BLOCK), 0.25)
    assert relative(wide(q, k, v)[0], full[0]) < FLOAT32
    assert relative(exact(q, k, v)[0], full[0]) < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gated_sum_is_as_near_to_float64_as_the_reference(impl, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(37, 3, 24)] * 3 + [(37, 3, 3), (37, 3, 24)]
    *branches, logits, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)

    def run(act, to=dtype):
        leaves = [x.to(to).detach().requires_grad_() for x in (*branches, logits)]
        out = act(leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(to))]

    found = run(lambda x: gated_sum(x[:3], x[3], impl=impl))
    own = run(lambda x: gated_sum(x[:3], x[3], impl="reference"))
    exact = run(lambda x: sum(x[i] * (1 / (1 + torch.exp(-x[3][..., i, None]))) for i in range(3)), torch.float64)
    for got, reference, right in zip(found, own, exact, strict=True):
        if dtype == torch.float32:
            assert relative(got, right) < FLOAT32
        else:
            require_as_near(got, reference, right, factor=1.5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"window": 0}, "window=0 must be an int of at least 1: keys per query; try 128"),
        ({"window": 2.5}, r"window=2.5 must be an int of at least 1"),
        ({"impl": "fast"}, "impl='fast' of window_attention must be None, 'triton' or 'reference'"),
    ],
)
def test_wrong_window_is_refused(changed, message):
    q, k, v, _ = draw(4, 2, 16, torch.float32)
    arguments = {"window": 4, "cu_seqlens": torch.tensor(DOCUMENTS)} | changed
    with pytest.raises(ValueError, match=message):
        window_attention(q, k, v, **arguments)


def test_wrong_branches_are_refused():
    o = torch.zeros(5, 2, 4)
    with pytest.raises(ValueError, match=r"branches must be 3 tensors \[tokens, H, D\], got list"):
        gated_sum([o, o], torch.zeros(5, 2, 3))
    with pytest.raises(ValueError, match=r"must have one shape \[tokens, H, D\]"):
        gated_sum([o, o, o[:4]], torch.zeros(5, 2, 3))
    with pytest.raises(ValueError, match=r"gate_logits \(5, 2\), torch.float32 must be \[5, 2, 3\]"):
        gated_sum([o, o, o], torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"H / G = 64 and D = 16 must be at most 32"):
        compressed_attention(
            *(torch.zeros(4, n, 16) for n in (64, 1, 1)), block_size=2, cu_seqlens=torch.tensor([0, 4]), impl="triton"
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_blocks_are_scored_by_the_compressed_branch(impl):
    """Its softmax counts the own block at the block's last token; everything else is as in softmax_sum, and the top-k is exact."""
    q, k, _, _ = draw(4, 2, 16, torch.float32)
    q, ends = 2 * q, torch.tensor(DOCUMENTS, dtype=torch.int32)
    found = {
        score: select_blocks(q, k, block_size=4, top_k=3, cu_seqlens=ends, score=score, impl=impl)
        for score in ("compressed", "softmax_sum")
    }
    oracle.check_selection(found["compressed"], q, k, DOCUMENTS, 4, 3, 0.25, "compressed")
    _, lse = compressed_attention(q, k, k, block_size=4, cu_seqlens=ends, impl=impl)
    common = {"block_size": 4, "top_k": 3, "cu_seqlens": ends, "impl": impl}
    assert torch.equal(select_blocks(q, k, score="compressed", lse=lse, **common), found["compressed"])
    with pytest.raises(
        ValueError, match=r"lse \(65, 4\), torch.float32 with score='softmax_sum' must be the log-sum-exp"
    ):
        select_blocks(q, k, lse=lse, **common)
    last = torch.tensor([(t - start) % 4 == 3 for t, (start, _) in enumerate(oracle.where(DOCUMENTS, len(q)))])
    differ = (found["compressed"] != found["softmax_sum"]).flatten(1).any(1)
    assert differ[last].any()
    assert not differ[~last].any()


COMPILE = """
import json, os, re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ssa_kernels.branches import autograd, kernels
from ssa_kernels import gated_sum_triton

FLOATS = ("lse_ptr", "delta_ptr", "sums_k_ptr", "sums_v_ptr")
INTEGERS = ("base_ptr", "position_ptr", "start_ptr", "length_ptr")

def usage(kernel, sizes, num_warps, num_stages=2, floats=()):
    constants = {name: sizes[name] for name in kernel.arg_names if name in sizes}
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*i32" if name in INTEGERS else "*fp32" if name in (*FLOATS, *floats) else "*bf16"
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": num_stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\\d+)", text).group(1)), int(re.search(r"REG:(\\d+)", text).group(1)), made.metadata.shared

found = {}
for group, dim in json.loads(os.environ["SHAPES"]):
    warps = autograd.forward_warps(dim)
    common = dict(KV_HEADS=2, GROUP_SIZE=group, PADDED_GROUP=group, HEAD_DIM=dim, DIM=dim, TILE_KEYS=autograd.TILE_KEYS)
    for name, branch in (("window", dict(UNIT=1, WINDOW=128)), ("compressed", dict(UNIT=16, WINDOW=0))):
        rows = dict(common, **branch, TILE_ROWS=autograd.TILE_ROWS)
        found[f"{name} forward {dim}"] = usage(kernels.range_forward_kernel, rows, warps)
        found[f"{name} dq {dim}"] = usage(kernels.range_dq_kernel, rows, autograd.DQ_WARPS)
        splits, floats = (1, ()) if name == "window" else (8, ("dk_ptr", "dv_ptr"))
        keys = dict(rows, TILE_ROWS=autograd.dkdv_rows(dim), SPLITS=splits)
        found[f"{name} dkdv {dim}"] = usage(kernels.range_dkdv_kernel, keys, warps, floats=floats)
    sizes = dict(HEAD_DIM=dim, DIM=dim, PADDED_BLOCK_SIZE=16, SPLITS=8, TILE_DIM=dim, TILE_VECTORS=2048 // dim)
    found[f"means {dim}"] = usage(kernels.means_kernel, sizes, 1)
    found[f"means backward {dim}"] = usage(kernels.means_backward_kernel, sizes, 1)
    found[f"gated sum {dim}"] = usage(gated_sum_triton.gated_sum_forward_kernel, sizes, 4)
    found[f"gated sum backward {dim}"] = usage(gated_sum_triton.gated_sum_backward_kernel, sizes, 4)
print(json.dumps(found))
"""


def test_kernels_compiled_for_hopper_do_not_spill(shapes=((16, 64),)):
    """Also that two programs of each kernel, or more, fit a multiprocessor, with 227 KB of shared memory. For D 64, the paper's."""
    pytest.importorskip("triton")
    path = str(Path(sys.modules["ssa_kernels"].__file__).parents[1])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path, "SHAPES": json.dumps(shapes)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 10 * len(shapes)
    assert {name: usage for name, usage in found.items() if usage[0]} == {}
    assert {name: usage for name, usage in found.items() if usage[2] > 113 * 1024} == {}
