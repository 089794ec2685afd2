"""Full attention of some runs of queries over all keys, by the library's kernel for packed documents: one call a run.

A run's queries are neighbours (documents.py, `QueryRun`), so each document's part of them is the end of what they see of the document. Packed
attention with different boundaries of queries and keys, its causal mask aligned at the bottom right, is then the stream itself: no query
meets a key twice or in vain. Keys past the run's last query are cut off; documents before it are keys without queries.

The kernel is torch's FlashAttention-2 (or 3 or 4, where the process has activated one; fused.py), whose causal mask is aligned that way.
Gradients of keys and values are summed over the runs in their own dtype, as the two streams' are.

Not done here: cuDNN's kernels, by torch or by Transformer Engine; their masks for these shapes have not been tried.
"""

import torch

from ..documents import QueryRun


def runs_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    runs: tuple[QueryRun, ...],
    *,
    max_length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (o [queries, H, D], lse float32 [1, queries, H], state_0, state_1).

    Args:
        q: [queries, H, D], the runs' queries one after another.
        k, v: [keys, G, D].
        runs: of the layout.
        max_length: no document is longer.
        scale: factor of the logits.
    """
    outs, lses, states = [], [], []
    for run, q_run in zip(runs, _pieces(q, runs), strict=True):
        o, lse_HT, *state = flash_forward(q_run, k[: run.end], v[: run.end], run, max_length, scale)
        outs.append(o)
        lses.append(lse_HT)
        states.append(state)
    # Without dropout the generators' states are not read; the first call's stand for all.
    return torch.cat(outs), torch.cat(lses, 1).transpose(0, 1)[None], *states[0]


def runs_backward(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    runs: tuple[QueryRun, ...],
    *,
    max_length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv) in the shapes of q, k and v; the other arguments as the forward took and gave them."""
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    dqs = []
    pieces = zip(runs, *(_pieces(x, runs) for x in (grad_o, q, o, lse[0])), strict=True)
    for run, grad_run, q_run, o_run, lse_TH in pieces:
        dq, dk_run, dv_run = flash_backward(
            grad_run,
            q_run,
            k[: run.end],
            v[: run.end],
            o_run,
            lse_TH.transpose(0, 1).contiguous(),
            states,
            run,
            max_length,
            scale,
        )
        dqs.append(dq)
        dk[: run.end] += dk_run
        dv[: run.end] += dv_run
    return torch.cat(dqs), dk, dv


def _pieces(x: torch.Tensor, runs: tuple[QueryRun, ...]) -> tuple[torch.Tensor, ...]:
    return x.split([run.length for run in runs])


def flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: QueryRun, max_length: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (o, lse [H, queries], and the states) of one run's queries over the keys before its end."""
    o, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, run.cu_seqlens_q, run.cu_seqlens_k, *_longest(run, max_length), 0.0, True, False, scale=scale
    )
    return o, lse, state, unused


def flash_backward(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    run: QueryRun,
    max_length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv) of one run, keys and values before its end."""
    return torch.ops.aten._flash_attention_backward(
        grad_o, q, k, v, o, lse, run.cu_seqlens_q, run.cu_seqlens_k, *_longest(run, max_length), 0.0, True, *states,
        scale=scale,
    )  # fmt: skip


def _longest(run: QueryRun, max_length: int) -> tuple[int, int]:
    """The most queries and the most keys of a document."""
    return min(run.length, max_length), min(run.end, max_length)
