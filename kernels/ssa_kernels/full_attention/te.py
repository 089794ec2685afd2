"""Transformer Engine's fused attention: cuDNN's kernels, with graphs kept from batch to batch, on packed documents or equal rows.

On Hopper it computes packed documents in two thirds of FlashAttention-2's time. Neither the number of documents nor the bound on their
length changes that: Transformer Engine rounds both up to sizes for which it builds a graph once. The calls are those of its own attention
module. The log-sum-exp is a natural logarithm: [tokens, H, 1] for documents (cuDNN 9.6 and later on sm_90 and sm_100),
[rows, H, tokens / rows, 1] for rows.

Not used in deterministic mode: for a deterministic backward on packed documents, version 2.20 with cuDNN 9.19 requests terabytes.
"""

import re
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

# The oldest version that this file's calls were tested with.
OLDEST = (2, 20)
PACKED = {"qkv_layout": "thd_thd_thd", "o_format": "thd", "attn_mask_type": "padding_causal"}
ROWS = {"qkv_layout": "bshd_bshd_bshd", "o_format": "bshd", "attn_mask_type": "causal"}


@cache
def is_usable() -> bool:
    """Returns whether a recent enough Transformer Engine is installed and loads with its torch extension. The first call takes seconds.

    Warns of an installed version that is too old or does not load. The first call must come before the process first uses torch's cuDNN:
    on a system with a cuDNN of its own, Transformer Engine loads the system's libraries, which cannot be loaded after torch's. So
    plan_fused calls this before anything else, whichever kernel it then chooses.
    """
    try:
        installed = version("transformer_engine")
    except PackageNotFoundError:
        return False
    if tuple(int(number) for number in re.findall(r"\d+", installed)[:2]) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        warnings.warn(
            f"Transformer Engine {installed} is older than {needed}; packed documents take FlashAttention instead. Install {needed} or later."
        )
        return False
    try:
        import transformer_engine.pytorch.cpp_extensions.fused_attn  # noqa: F401
    except (ImportError, OSError) as error:
        warnings.warn(
            f"Transformer Engine is installed but does not load ({error}); packed documents take FlashAttention instead. If the process "
            "used torch's cuDNN before, import transformer_engine.pytorch first; else reinstall it for this torch."
        )
        return False
    return True


def te_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    num_rows: int,
    max_length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (o [tokens, H, D], lse in this module's layout, random state). num_rows is 0 for packed documents."""
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    ends, layout = _layout(cu_seqlens, num_rows)
    o, (lse, state) = fused_attn.fused_attn_fwd(
        True, max_length, max_length, ends, ends, *(_shaped(x, num_rows) for x in (q, k, v)), q.dtype,
        fused_attn.FusedAttnBackend["F16_arbitrary_seqlen"], attn_scale=scale, **layout,
    )  # fmt: skip
    if lse.dim() != (4 if num_rows else 3):
        raise ValueError(
            f"lse of Transformer Engine has shape {tuple(lse.shape)}, not [tokens, H, 1]: cuDNN is too old; try backend='flash'"
        )
    return o.view(q.shape), lse, state


def te_backward(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    num_rows: int,
    max_length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv); lse and state are the forward's results."""
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    ends, layout = _layout(cu_seqlens, num_rows)
    dq, dk, dv, *_ = fused_attn.fused_attn_bwd(
        max_length, max_length, ends, ends, *(_shaped(x, num_rows) for x in (q, k, v, o, grad_o)), q.dtype, [lse, state],
        fused_attn.FusedAttnBackend["F16_arbitrary_seqlen"], attn_scale=scale, do_format=layout["o_format"],
        dqkv_layout=layout["qkv_layout"], **layout,
    )  # fmt: skip
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def _layout(cu_seqlens: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, dict]:
    """Returns the boundaries and the keywords that name the layout. Of equal rows only the number of boundaries is read."""
    if num_rows:
        return cu_seqlens[: num_rows + 1], ROWS
    return cu_seqlens, {**PACKED, "cu_seqlens_q_padded": cu_seqlens, "cu_seqlens_kv_padded": cu_seqlens}


def _shaped(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    return x.view(num_rows, -1, *x.shape[1:]) if num_rows else x
