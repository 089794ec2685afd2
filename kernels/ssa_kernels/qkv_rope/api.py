"""`qkv_rope`: the public function, its checks and the choice of implementation."""

import torch

from ..checks import INTEGERS, check_floats, check_tensors, check_whole, looks_at_values
from ..dispatch import past_modes, resolve_impl
from .reference import qkv_rope_reference


@past_modes
def qkv_rope(
    mixed: torch.Tensor,
    angles: torch.Tensor,
    positions: torch.Tensor,
    *,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    num_gates: int,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns (q, k, v, gate logits): q `[tokens, G * group_size, D]` and k `[tokens, G, D]` rotated, v `[tokens, G, D]`, all contiguous.

    Args:
        mixed: `[tokens, G * W]` with W = (group_size + 2) * D + num_gates, the output of one projection. Each kv head has its group's
            queries, its keys, its values and its gate logits, in this order.
        angles: float32 `[positions, D]` or `[positions, D / 2]`, the rotation's angles by position. Only the first D / 2 columns are read.
            The caller computes them (base, Llama-3 scaling). They get no gradient.
        positions: int64 or int32 `[tokens]`, each token's row in `angles`. A CPU refuses positions outside `angles`. On a GPU, where
            checking would mean waiting, the kernels read the nearest row.
        num_kv_heads: G.
        group_size: query heads per kv head.
        head_dim: D, even.
        num_gates: gate logits per kv head. The fourth result is `[tokens, G * num_gates]`, or None if this is 0.
        impl: None, "triton" or "reference".

    Raises:
        ValueError: for arguments that do not fit each other, and for inputs that the implementation does not support (float64: reference only).
    """
    sizes = {
        "num_kv_heads": check_whole("num_kv_heads", num_kv_heads, least=1),
        "group_size": check_whole("group_size", group_size, least=1),
        "head_dim": check_whole("head_dim", head_dim, least=1),
        "num_gates": check_whole("num_gates", num_gates, least=0),
    }
    check_projection(mixed, angles, positions, **sizes)
    mixed, positions = mixed.contiguous(), positions.contiguous()
    if angles.stride(1) != 1:
        angles = angles.contiguous()
    if resolve_impl(impl, mixed, "qkv_rope") == "reference":
        return qkv_rope_reference(mixed, angles, positions, **sizes)
    from .triton import QKVRope  # imported here because Triton may be missing on a CPU machine

    q, k, v, gate = QKVRope.apply(mixed, angles, positions, *sizes.values())
    return q, k, v, gate if num_gates else None


def check_projection(
    mixed: torch.Tensor,
    angles: torch.Tensor,
    positions: torch.Tensor,
    *,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    num_gates: int,
) -> None:
    """Raises ValueError unless dtypes, devices and shapes fit each other and, on a CPU, positions are within `angles`."""
    check_tensors(mixed=mixed, angles=angles, positions=positions)
    check_floats(mixed=mixed)
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even and at least 2: RoPE rotates pairs")
    width = num_kv_heads * ((group_size + 2) * head_dim + num_gates)
    if mixed.dim() != 2 or mixed.shape[1] != width:
        raise ValueError(
            f"mixed {tuple(mixed.shape)} must be [tokens, {width}] for num_kv_heads={num_kv_heads}, group_size={group_size}, "
            f"head_dim={head_dim} and num_gates={num_gates}"
        )
    if positions.shape != mixed.shape[:1] or positions.dtype not in INTEGERS:
        raise ValueError(
            f"positions {tuple(positions.shape)}, {positions.dtype} must be one integer for each of {mixed.shape[0]} tokens "
            "of mixed, int64 or int32"
        )
    rows = angles.shape[0] if angles.dim() == 2 else 0
    if rows < 1 or angles.shape[1] < head_dim // 2 or angles.dtype != torch.float32:
        raise ValueError(
            f"angles {tuple(angles.shape)}, {angles.dtype} must be float32 [positions, {head_dim}] or [positions, {head_dim // 2}], at least "
            "one position"
        )
    if angles.requires_grad and torch.is_grad_enabled():
        raise ValueError("angles get no gradient, so they must not require one; try angles.detach()")
    if looks_at_values(positions) and len(positions):
        lowest, highest = (int(x) for x in torch.aminmax(positions))
        if lowest < 0 or highest >= rows:
            raise ValueError(f"positions from {lowest} to {highest} must lie in [0, {rows}), the rows of angles")
