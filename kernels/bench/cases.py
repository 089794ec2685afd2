"""The cases of the benchmark. Each yields rows of the table: a value, with the bounds that it must and should reach.

Full attention is torch's `scaled_dot_product_attention` restricted to one backend, forward and backward through autograd, on the same
tensors. Ours is timed through the public functions and autograd as well. Only the documents' layout is prepared outside the timed region,
because one microbatch shares it between all its layers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssa_kernels import (
    SampledQueries,
    full_attention,
    gate_and_align,
    sample_queries,
    select_blocks,
    sparse_attention,
    ssa_attention,
)
from ssa_kernels.documents import DocumentLayout
from ssa_kernels.full_attention import te

from . import shapes
from .shapes import BLOCK_SIZE, TOP_K, Shape
from .timing import median_ms, medians_ms, repetitions_for, workspace_bytes

Bounds = tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `must` and `aim` are bounds on the value: lower bounds if `higher` is better, else upper bounds."""

    name: str
    value: float
    unit: str
    must: float | None = None
    aim: float | None = None
    higher: bool = True
    detail: str = ""

    @classmethod
    def bounded(
        cls, name: str, value: float, unit: str, bounds: Bounds, *, higher: bool = True, detail: str = ""
    ) -> "Row":
        """Returns a row with bounds (must, aim), or without bounds."""
        must, aim = bounds or (None, None)
        return cls(name, value, unit, must, aim, higher, detail)

    @property
    def verdict(self) -> str:
        """Returns the bound that the value reaches, "aim" or "must", else "missed"; empty if the row has no bounds."""
        if self.must is None:
            return ""
        sign = 1 if self.higher else -1
        if self.aim is not None and sign * self.value >= sign * self.aim:
            return "aim"
        return "must" if sign * self.value >= sign * self.must else "missed"


class Problem:
    """One shape's tensors, and the calls that are timed on them."""

    def __init__(self, shape: Shape, layout: DocumentLayout | None = None) -> None:
        self.shape = shape
        self.one_document_per_row = layout is None
        self.layout = shapes.equal_rows(shape) if layout is None else layout
        self.q = shapes.random_heads(shape, shape.heads, 1).requires_grad_()
        self.k = shapes.random_heads(shape, shape.kv_heads, 2).requires_grad_()
        self.v = shapes.random_heads(shape, shape.kv_heads, 3).requires_grad_()
        self.grad = shapes.random_heads(shape, shape.heads, 4)

    def choose(self) -> torch.Tensor:
        """Returns the chosen blocks."""
        return select_blocks(self.q, self.k, block_size=BLOCK_SIZE, top_k=TOP_K, cu_seqlens=self.layout)

    def sparse(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns the sparse stream's output."""
        return sparse_attention(self.q, self.k, self.v, indices, block_size=BLOCK_SIZE, cu_seqlens=self.layout)[0]

    def selection_and_sparse(self) -> torch.Tensor:
        """Returns the sparse stream's output, selection included."""
        return self.sparse(self.choose())

    def full(self, backend: str | None = None) -> torch.Tensor:
        """Returns the full stream's output by this package."""
        num_rows = self.shape.num_rows if self.one_document_per_row else None
        return full_attention(self.q, self.k, self.v, cu_seqlens=self.layout, num_rows=num_rows, backend=backend)[0]

    def sdpa(self, backend: SDPBackend) -> torch.Tensor:
        """Returns the full stream's output by torch, [tokens, H, D]."""
        q, k, v = (x.view(self.shape.num_rows, -1, *x.shape[1:]).transpose(1, 2) for x in (self.q, self.k, self.v))
        with sdpa_kernel(backend):
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return o.transpose(1, 2).reshape(self.q.shape)

    def both(self, forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        """Returns a call that runs a forward and its backward."""

        def call() -> None:
            for leaf in (self.q, self.k, self.v):
                leaf.grad = None
            forward().backward(self.grad)

        return call

    def ssa_layer(self, main: str, sample: SampledQueries | None = None) -> Callable[[], None]:
        """Returns a call that runs both streams, gate and alignment, forward and backward; the counterpart for the sample if one is given."""
        logits = shapes.random_heads(self.shape, self.shape.heads, 5)[..., 0].contiguous().requires_grad_()
        one = torch.ones((), device="cuda")

        def call() -> None:
            for leaf in (self.q, self.k, self.v, logits):
                leaf.grad = None
            result = ssa_attention(
                self.q, self.k, self.v, logits, block_size=BLOCK_SIZE, top_k=TOP_K, cu_seqlens=self.layout,
                main=main, num_rows=self.shape.num_rows, sample=sample,
            )  # fmt: skip
            torch.autograd.backward((result.out, result.alignment_loss), (self.grad, one))

        return call

    def time(self, forward: Callable[[], torch.Tensor]) -> tuple[float, float]:
        """Returns (forward, forward + backward) in ms. The forward saves what a backward would need."""
        both = self.both(forward)
        first = median_ms(both, 1, 2)
        return median_ms(lambda: forward().detach(), repetitions_for(first / 3)), median_ms(
            both, repetitions_for(first)
        )


def wide_heads(shape: Shape) -> Iterator[Row]:
    """Yields the same for heads wider than 128, against FlashAttention-2, and the time of each part."""
    problem = Problem(shape)
    full_f, full_fb = problem.time(lambda: problem.sdpa(SDPBackend.FLASH_ATTENTION))
    indices = problem.choose()
    choice = median_ms(problem.choose)
    sparse_f, sparse_fb = problem.time(lambda: problem.sparse(indices))
    name = f"selection + sparse / FlashAttention-2 full, {shape.name}"
    both, forward = choice + sparse_fb, choice + sparse_f
    yield Row(f"{name}, fwd+bwd", full_fb / both, "x", detail=f"{full_fb:.2f} / {both:.2f} ms")
    yield Row(f"{name}, fwd", full_f / forward, "x", detail=f"{full_f:.2f} / {forward:.2f} ms")
    detail = f"forward {sparse_f:.2f}, forward + backward {sparse_fb:.2f} ms"
    yield Row("selection of that", choice, "ms", higher=False, detail=detail)


def streams(shape: Shape, both: Bounds = None, forward: Bounds = None) -> Iterator[Row]:
    """Yields the speed of selection + sparse attention relative to full attention, forward + backward and forward only."""
    problem = Problem(shape)
    full_f, full_fb = problem.time(lambda: problem.sdpa(SDPBackend.CUDNN_ATTENTION))
    ours_f, ours_fb = problem.time(problem.selection_and_sparse)
    name = f"selection + sparse / cuDNN full, {shape.name}"
    detail = f"{full_fb:.2f} / {ours_fb:.2f} ms"
    yield Row.bounded(f"{name}, fwd+bwd", full_fb / ours_fb, "x", both, detail=detail)
    yield Row.bounded(f"{name}, fwd", full_f / ours_f, "x", forward, detail=f"{full_f:.2f} / {ours_f:.2f} ms")
    if shape.row_length <= 32768:
        flash_f, flash_fb = problem.time(lambda: problem.sdpa(SDPBackend.FLASH_ATTENTION))
        detail = f"{flash_f:.2f}, {flash_fb:.2f} ms"
        yield Row(f"the same against FlashAttention-2, {shape.name}, fwd+bwd", flash_fb / ours_fb, "x", detail=detail)
        torch_call = problem.both(lambda: problem.sdpa(SDPBackend.CUDNN_ATTENTION))
        for backend in ("cudnn", "te") if te.is_usable() else ("cudnn",):
            calls = [problem.both(lambda backend=backend: problem.full(backend)), torch_call]
            own_ms, torch_ms = medians_ms(calls, repetitions_for(2 * full_fb))
            name = f"full_attention by {backend} / torch's cuDNN, {shape.name}, fwd+bwd"
            detail = f"{own_ms:.2f} / {torch_ms:.2f} ms, in turns"
            bounds = (1.02, 1.0) if backend == "cudnn" else None
            yield Row.bounded(name, own_ms / torch_ms, "x", bounds, higher=False, detail=detail)


def plain_boundaries(shape: Shape, must: float, aim: float) -> Iterator[Row]:
    """`select_blocks` with the boundaries' tensor over the same call with a prepared layout, in turns."""
    problem = Problem(shape)
    boundaries = problem.layout.cu_seqlens

    def plain() -> torch.Tensor:
        return select_blocks(problem.q, problem.k, block_size=BLOCK_SIZE, top_k=TOP_K, cu_seqlens=boundaries)

    plain_ms, prepared_ms = medians_ms([plain, problem.choose], 40)
    name = f"select_blocks with a tensor of boundaries / a layout, {shape.name}, fwd"
    detail = f"{plain_ms:.2f} / {prepared_ms:.2f} ms, in turns"
    yield Row(name, plain_ms / prepared_ms, "x", must, aim, False, detail)


def layer(shape: Shape, must: float, aim: float) -> Iterator[Row]:
    """Both streams, gate and alignment, forward and backward measured as one, over cuDNN's full attention alone.

    At r = 1 all queries compute both streams. At r = 1/4 a sample of the queries computes the counterpart of the main stream. Training draws
    3/8 of them if the main stream is full and 1/8 if it is sparse; "mean" weighs both main streams equally.
    """
    problem = Problem(shape)
    many, few = (sample_queries(problem.layout, shapes.mirrored_slices(shape, share)) for share in (3 / 8, 1 / 8))
    calls = [
        problem.both(lambda: problem.sdpa(SDPBackend.CUDNN_ATTENTION)),
        problem.ssa_layer("full"),
        problem.ssa_layer("full", many),
        problem.ssa_layer("sparse", few),
    ]
    expected = sum(median_ms(call, 1, 2) for call in calls)
    full, both, main_full, main_sparse = medians_ms(calls, repetitions_for(expected))
    for name, ms, bounds in (
        ("", both, (must, aim)),
        (" at r = 1/4, main full", main_full, None),
        (" at r = 1/4, main sparse", main_sparse, None),
        (" at r = 1/4, mean", (main_full + main_sparse) / 2, None),
    ):
        detail = f"{ms:.2f} / {full:.2f} ms, in turns"
        name = f"ssa layer{name} / cuDNN full, {shape.name}, fwd+bwd"
        yield Row.bounded(name, ms / full, "x", bounds, higher=False, detail=detail)


def gate(shape: Shape, copy: float) -> Iterator[Row]:
    """Yields the bandwidth of gate and alignment, in bytes that must move, relative to a copy's bandwidth in the same run."""
    a, b, grad = (shapes.random_heads(shape, shape.heads, seed) for seed in (1, 2, 3))
    logits = torch.randn(shape.tokens, shape.heads, device="cuda", dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (a, b, logits)]
    one = torch.ones((), device="cuda")
    forward_ms = median_ms(lambda: gate_and_align(*leaves, main="full"), 40)
    outs = gate_and_align(*leaves, main="full")
    backward_ms = median_ms(lambda: torch.autograd.grad(outs, leaves, (grad, one), retain_graph=True), 40)
    forward_bytes = 3 * a.nbytes + logits.nbytes
    # The two deltas are float32, so each is twice the logits' size.
    backward_bytes = 5 * a.nbytes + 2 * logits.nbytes + 2 * 2 * logits.nbytes
    for name, bytes_moved, ms in (("fwd", forward_bytes, forward_ms), ("bwd", backward_bytes, backward_ms)):
        share = bytes_moved / (ms * 1e-3) / copy
        detail = f"{ms:.3f} ms, {bytes_moved / ms / 1e9:.2f} TB/s"
        yield Row(f"gate + alignment, share of the copy's bandwidth, {name}", share, "", 0.92, 0.97, True, detail)


def documents(shape: Shape, mean_length: int, must: float, aim: float) -> Iterator[Row]:
    """Yields the time on rows packed with short documents relative to one document per row: selection + sparse, forward + backward."""
    whole = Problem(shape)
    _, whole_ms = whole.time(whole.selection_and_sparse)
    packed = Problem(shape, shapes.random_documents(shape, mean_length))
    _, packed_ms = packed.time(packed.selection_and_sparse)
    name = f"documents of mean length {mean_length} / one per row, {shape.name}"
    yield Row(f"{name}, fwd+bwd", packed_ms / whole_ms, "x", must, aim, False, f"{packed_ms:.2f} / {whole_ms:.2f} ms")
    _, full_ms = packed.time(packed.full)
    yield Row(
        f"the same documents, full_attention / selection + sparse, {shape.name}",
        full_ms / packed_ms,
        "x",
        detail=f"{full_ms:.2f} ms",
    )


def sink(shape: Shape, must: float, aim: float) -> Iterator[Row]:
    """Yields the time if every query chooses block 0 and 14 random blocks, relative to 15 random ones: sparse attention, forward + backward."""
    problem = Problem(shape)
    times = []
    for with_sink in (False, True):
        indices = shapes.uniform_choices(shape, problem.layout, sink=with_sink)
        times.append(problem.time(lambda indices=indices: problem.sparse(indices))[1])
    even, skewed = times
    yield Row(
        f"a sink / even choices, {shape.name}, fwd+bwd",
        skewed / even,
        "x",
        must,
        aim,
        False,
        f"{skewed:.2f} / {even:.2f} ms",
    )


def memory(shape: Shape, must: float) -> Iterator[Row]:
    """Yields the peak memory of selection + sparse beyond inputs, outputs, tensors saved for the backward, and gradients."""
    problem = Problem(shape)
    problem.both(problem.selection_and_sparse)()
    for leaf in (problem.q, problem.k, problem.v):
        leaf.grad = None
    before = torch.cuda.memory_allocated()
    forward = workspace_bytes(problem.selection_and_sparse, lambda _: torch.cuda.memory_allocated() - before)
    out = problem.selection_and_sparse()
    held = torch.cuda.memory_allocated()
    leaves = (problem.q, problem.k, problem.v)
    backward = workspace_bytes(
        lambda: torch.autograd.grad(out, leaves, problem.grad, retain_graph=True),
        lambda _: torch.cuda.memory_allocated() - held,
    )
    detail = f"fwd {forward / 1e9:.2f}, bwd {backward / 1e9:.2f} GB"
    yield Row(
        f"workspace of selection + sparse, {shape.name}", max(forward, backward) / 1e9, "GB", must, None, False, detail
    )
