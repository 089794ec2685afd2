"""The trained scorer's operators on one GPU: checked against float64 on a small problem, then timed beside selection by means and full attention."""

from collections.abc import Iterator

import torch

from ssa_kernels import build_layout, choose_by_index, index_loss, sample_queries, select_blocks

from . import shapes
from .cases import Problem, Row
from .shapes import Shape
from .timing import median_ms, repetitions_for

BLOCKS = ((128, 16), (16, 16))  # keys and chosen blocks: the method indexer's, and ssa's
SHARE = 1 / 8


def failures() -> list[str]:
    """Returns what is wrong with the kernels on a small problem, in words."""
    generator = torch.Generator("cuda").manual_seed(0)
    heads = (2, 2, 32, 2)
    tensors = [torch.randn(2000, h, 64, device="cuda", generator=generator).bfloat16() for h in heads]
    layout = build_layout(torch.tensor([0, 300, 2000], device="cuda"), num_tokens=2000, block_size=64)
    found = []
    for exact in (False, True):
        iq, ik, q, k = (x.double() if exact else x for x in tensors)
        arguments = (iq.requires_grad_(), ik.requires_grad_(), q, k)
        loss, _ = index_loss(*arguments, block_size=64, top_k=4, cu_seqlens=layout, impl="reference" if exact else None)
        found.append([loss, *torch.autograd.grad(loss, arguments[:2])])
    pairs = zip(("index loss", "its gradient of iq", "its gradient of ik"), *found, strict=True)
    errors = {name: float((ours.double() - theirs).norm() / theirs.norm()) for name, ours, theirs in pairs}
    return [f"{name} is off by {error:.1e}" for name, error in errors.items() if not error < 2e-2]


def rows(shape: Shape) -> Iterator[Row]:
    """Yields the time of the choice over that by means of keys, and of the index loss over full attention's forward and backward."""
    problem = Problem(shape)
    iq, ik = (shapes.random_heads(shape, shape.kv_heads, seed).requires_grad_() for seed in (6, 7))
    full = problem.both(problem.full)
    full_ms = median_ms(full, repetitions_for(median_ms(full, 1, 2)))
    q, k = problem.q.detach(), problem.k.detach()
    for block_size, top_k in BLOCKS:
        lengths = problem.layout.cu_seqlens
        layout = build_layout(lengths, num_tokens=shape.tokens, block_size=block_size, max_length=shape.row_length)
        sizes = {"block_size": block_size, "top_k": top_k, "cu_seqlens": layout}
        means_ms = median_ms(lambda s=sizes: select_blocks(q, k, **s), 20)
        choice_ms = median_ms(lambda s=sizes: choose_by_index(iq, ik, **s), 20)
        name = f"{block_size} x {top_k}, {shape.name}"
        detail = f"{choice_ms:.2f} / {means_ms:.2f} ms"
        yield Row(
            f"choice by a trained scorer / by means, {name}", choice_ms / means_ms, "x", higher=False, detail=detail
        )
        sample = sample_queries(layout, shapes.mirrored_slices(shape, SHARE))
        own = sample.take(iq.detach()).requires_grad_()
        arguments = (own, ik, sample.take(q), k)
        sizes["cu_seqlens"] = sample.layout

        def loss(arguments=arguments, sizes=sizes) -> None:
            torch.autograd.grad(index_loss(*arguments, **sizes).loss, arguments[:2])

        loss_ms = median_ms(loss, repetitions_for(median_ms(loss, 1, 2)))
        detail = f"{loss_ms:.2f} / {full_ms:.2f} ms"
        name = f"index loss of 1/8 of the queries / full attention fwd+bwd, {name}"
        yield Row(name, loss_ms / full_ms, "x", higher=False, detail=detail)
