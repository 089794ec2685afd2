"""`ssa_attention`: both streams, the gate and the alignment of one layer behind one name.

    o_full, lse_full = full_attention(q, k, v)
    indices = select_blocks(q, k)
    o_sparse, lse_sparse = sparse_attention(q, k, v, indices)
    out, alignment_loss = gate_and_align(o_full, o_sparse, gate_logits, main)
    captured_mass = mean of exp(lse_sparse - lse_full)

`composed` is exactly that, by the public operators, and defines correctness. On a GPU one autograd function computes the same in fewer
passes (autograd.py). If top_k blocks cover every document (by the layout's `max_length`), both streams are the same (`covered`).

With a sample of queries (`sample_queries`), the main stream is computed for all queries and the other one, with the alignment and the
captured mass, for the sample (`composed`; on a GPU sampled.py).
Source: arXiv 2511.20102, section 3.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..captured_mass import captured_mass
from ..checks import aligned, check_attention, check_scale
from ..dispatch import past_modes, resolve_impl
from ..documents import DocumentLayout, as_layout
from ..full_attention.api import check_rows, full_attention
from ..gate import gate
from ..gate_and_align.api import check_gate_inputs, check_weights, gate_and_align, main_operand
from ..queries import SampledQueries
from ..select.api import check_selection, select_blocks
from ..sparse_attention.api import sparse_attention

Select = Callable[[torch.Tensor, torch.Tensor, DocumentLayout], torch.Tensor]  # (q, k, layout) -> indices


class Selection(NamedTuple):
    """How blocks are chosen: by `select` if it is given, else by `select_blocks` with the score."""

    block_size: int
    top_k: int
    score: str
    select: Select | None = None

    def choose(
        self, q: torch.Tensor, k: torch.Tensor, layout: DocumentLayout, *, scale: float, impl: str | None
    ) -> torch.Tensor:
        """Returns the blocks of each query; q and k need no gradient here."""
        if self.select is not None:
            return self.select(q, k, layout)
        size, top_k = self.block_size, self.top_k
        return select_blocks(
            q, k, block_size=size, top_k=top_k, cu_seqlens=layout, scale=scale, score=self.score, impl=impl
        )


class SSAOutput(NamedTuple):
    """The results of one layer."""

    out: torch.Tensor  # [tokens, H, D], the gated main stream in q's dtype
    alignment_loss: torch.Tensor  # scalar, float32: the mean over tokens x H x D, or over the sampled ones
    captured_mass: torch.Tensor  # scalar, float32, no gradient: the mean over tokens x H, or over the sampled ones


@past_modes
def ssa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_logits: torch.Tensor | None,
    *,
    block_size: int,
    top_k: int,
    cu_seqlens: torch.Tensor | DocumentLayout,
    main: str | torch.Tensor,
    weights: tuple[float, float] = (1.0, 1.0),
    scale: float | None = None,
    score: str = "softmax_sum",
    select: Select | None = None,
    num_rows: int | None = None,
    sample: SampledQueries | None = None,
    impl: str | None = None,
) -> SSAOutput:
    """Returns (out, alignment_loss, captured_mass), differentiable in q, k, v and gate_logits.

    The backward keeps q, k, v, both streams' outputs and log-sum-exps, the chosen blocks and the logits, and nothing else that is large.

    Args:
        q: `[tokens, H, D]`.
        k, v: `[tokens, G, D]`, G dividing H, in q's dtype.
        gate_logits: `[tokens, H]` in q's dtype or float32; None for no gate, which is a gate of 1.
        block_size, top_k, score: as in `select_blocks`.
        select: chooses the blocks in place of `select_blocks`: (q, k, layout) -> indices as `sparse_attention` takes
            them. A query with at most top_k blocks up to its own must get all of them.
        cu_seqlens: int32 `[documents + 1]`, or a layout built from it; a layout with `max_length` is faster.
        main, weights: as in `gate_and_align`.
        scale: factor of the logits, default D^-1/2.
        num_rows: as in `full_attention`.
        sample: the queries that compute both streams, by `sample_queries` of the same layout; None: all. `main` is then a name.
        impl: None, "triton" or "reference".

    Raises:
        ValueError: for arguments that do not fit each other, and for inputs that the implementation does not support (see
            `full_attention` and `select_blocks`).
    """
    check_attention(q=q, k=k, v=v)
    logits = q.new_full(q.shape[:2], torch.inf) if gate_logits is None else gate_logits
    check_gate_inputs("q", q, logits, main)
    weights, scale = check_weights(weights), check_scale(scale, q.shape[-1])
    layout = as_layout(cu_seqlens, q, k, block_size=block_size)
    check_rows(layout, q.shape[0], num_rows)
    selection = Selection(layout.block_size, check_selection(layout.block_size, top_k, score), score, select)
    _check_sample(sample, layout, main)
    common = {"layout": layout, "main": main, "scale": scale, "num_rows": num_rows, "impl": impl}
    if resolve_impl(impl, q, "ssa_attention") == "reference" or not q.is_cuda:
        return composed(q, k, v, logits, selection=selection, weights=weights, sample=sample, **common)
    if selection.top_k * layout.block_size >= layout.max_length:
        return covered(q, k, v, logits, **common)
    # Imported here because Triton may be missing on a CPU machine.
    from .autograd import SSAAttention
    from .sampled import SampledStreams

    tensors = [aligned(x) for x in (q, k, v, logits)]
    if sample is not None:
        return SSAOutput(*SampledStreams.apply(*tensors, main, weights, layout, sample, selection, scale, num_rows))
    return SSAOutput(*SSAAttention.apply(*tensors, main_operand(main), weights, layout, selection, scale, num_rows))


def _check_sample(sample: object, layout: DocumentLayout, main: str | torch.Tensor) -> None:
    """Raises ValueError unless the sample is None, or of this layout's queries and with a main stream that the host knows."""
    if sample is None:
        return
    if not isinstance(sample, SampledQueries):
        raise ValueError(f"sample must be None or a SampledQueries by sample_queries, got {type(sample).__name__}")
    theirs = sample.layout
    if (sample.num_queries, theirs.num_tokens, theirs.block_size) != (
        layout.num_queries,
        layout.num_tokens,
        layout.block_size,
    ):
        raise ValueError(
            f"sample of {sample.num_queries} queries, {theirs.num_tokens} tokens and blocks of {theirs.block_size} must be of the layout's "
            f"{layout.num_queries}, {layout.num_tokens} and {layout.block_size}; take it by sample_queries(layout, slices)"
        )
    if isinstance(main, torch.Tensor):
        raise ValueError(
            "main must be 'full' or 'sparse' with a sample of queries: the host must know which stream is computed for all"
        )


def composed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_logits: torch.Tensor,
    *,
    layout: DocumentLayout,
    selection: Selection,
    main: str | torch.Tensor,
    weights: tuple[float, float],
    scale: float,
    num_rows: int | None,
    impl: str | None,
    sample: SampledQueries | None = None,
) -> SSAOutput:
    """Returns the result of `ssa_attention`, by the public operators one after another."""

    def stream(name: str, q: torch.Tensor, layout: DocumentLayout, num_rows: int | None):
        common = {"cu_seqlens": layout, "scale": scale, "impl": impl}
        if name == "full":
            o, lse = full_attention(q, k, v, return_lse=True, num_rows=num_rows, **common)
            assert lse is not None  # return_lse is set
            return o, lse
        indices = selection.choose(q.detach(), k.detach(), layout, scale=scale, impl=impl)
        return sparse_attention(q, k, v, indices, block_size=selection.block_size, **common)

    streams, logits = {}, gate_logits
    for name in ("full", "sparse"):
        if sample is None or name == main:
            streams[name] = stream(name, q, layout, num_rows)
        else:
            streams[name] = stream(name, sample.take(q), sample.layout, None)
    if sample is not None:
        assert isinstance(main, str)  # _check_sample refuses a number on the device
        gated = gate(streams[main][0], gate_logits, impl=impl)
        streams[main], logits = tuple(map(sample.take, streams[main])), sample.take(gate_logits)
    (o_full, lse_full), (o_sparse, lse_sparse) = streams["full"], streams["sparse"]
    out, loss = gate_and_align(o_full, o_sparse, logits, main=main, weights=weights, impl=impl)
    return SSAOutput(out if sample is None else gated, loss, captured_mass(lse_full, lse_sparse).mean())


def covered(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_logits: torch.Tensor,
    *,
    layout: DocumentLayout,
    main: str | torch.Tensor,
    scale: float,
    num_rows: int | None,
    impl: str | None,
) -> SSAOutput:
    """Returns the result of `composed` if every query chooses every block: both streams are the full one, so nothing is left to align."""
    o, _ = full_attention(q, k, v, cu_seqlens=layout, scale=scale, num_rows=num_rows, impl=impl)
    # With weights of 0 the loss is exactly 0. With others a fused multiply-add may leave 1e-18.
    out, loss = gate_and_align(o, o, gate_logits, main=main, weights=(0.0, 0.0), impl=impl)
    return SSAOutput(out, loss, torch.ones((), dtype=torch.float32, device=q.device))
