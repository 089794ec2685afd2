"""`qkv_rope` and `rope`: the public functions, their checks and the choice of implementation."""

import torch

from ..checks import INTEGERS, check_floats, check_number, check_tensors, check_whole, looks_at_values
from ..dispatch import past_modes, resolve_impl
from .reference import QKNorm, qkv_rope_reference, rope_reference


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
    norm: QKNorm | None = None,
    rotate_keys: bool = True,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns (q, k, v, gate logits): q `[tokens, G * group_size, D]` and k `[tokens, G, D]` rotated, v `[tokens, G, D]`, all contiguous.

    Differentiable in `mixed` and the norm's weights.

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
        norm: QK-norm of each head before its rotation, with weights `[D]` in mixed's dtype or float32; None: no norm.
        rotate_keys: False returns k as it is in `mixed`, without norm and rotation, for an operator in between (`key_convolution`) and `rope`.
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
    if norm is not None:
        norm = check_norm(norm, mixed, sizes["head_dim"])
    if not isinstance(rotate_keys, bool):
        raise ValueError(f"rotate_keys={rotate_keys!r} must be True or False")
    mixed, positions = mixed.contiguous(), positions.contiguous()
    if angles.stride(1) != 1:
        angles = angles.contiguous()
    if resolve_impl(impl, mixed, "qkv_rope") == "reference":
        return qkv_rope_reference(mixed, angles, positions, **sizes, norm=norm, rotate_keys=rotate_keys)
    from .triton import RAW, ROTATED, QKVRope, Sizes  # imported here because Triton may be missing on a CPU machine

    keys = ROTATED if rotate_keys else RAW
    shape = Sizes(num_kv_heads, group_size, head_dim, num_gates, keys)
    q, k, v, gate = QKVRope.apply(mixed, angles, positions, shape, *(norm or ()))
    return q, k, v, gate if num_gates else None


@past_modes
def rope(
    x: torch.Tensor,
    angles: torch.Tensor,
    positions: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    impl: str | None = None,
) -> torch.Tensor:
    """Returns heads normed and rotated, `[tokens, heads, D]`: what `qkv_rope` does to keys. Differentiable in x and the weight.

    Args:
        x: `[tokens, heads, D]`, D even.
        angles, positions: as in `qkv_rope`.
        weight: of the norm, `[D]`, in x's dtype or float32; None: no norm.
        eps: added to the mean square.
        impl: None, "triton" or "reference".

    Raises:
        ValueError: for arguments that do not fit each other, and for inputs that the implementation does not support (float64: reference only).
    """
    check_tensors(x=x, angles=angles, positions=positions)
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x {tuple(x.shape)} must be [tokens, heads, D] with at least one head")
    heads, head_dim = x.shape[1:]
    check_floats(x=x)
    check_angles("x", x, angles, positions, head_dim)
    if weight is not None:
        weight, _, eps = check_norm(QKNorm(weight, weight, eps), x, head_dim)
    x, positions = x.contiguous(), positions.contiguous()
    if angles.stride(1) != 1:
        angles = angles.contiguous()
    if resolve_impl(impl, x, "rope") == "reference":
        return rope_reference(x, angles, positions, weight, eps)
    from .triton import NONE, QKVRope, Sizes

    norm = () if weight is None else (weight, None, eps)
    out, *_ = QKVRope.apply(x.flatten(1), angles, positions, Sizes(heads, 1, head_dim, 0, NONE), *norm)
    return out


def check_norm(norm: QKNorm, x: torch.Tensor, head_dim: int) -> QKNorm:
    """Returns the norm with contiguous weights. Raises ValueError unless they are [D], on x's device, in its dtype or float32."""
    if not isinstance(norm, tuple) or len(norm) != 3:
        raise ValueError(f"norm must be None or a QKNorm(q, k, eps), got {type(norm).__name__}")
    weights = {"norm.q": norm[0], "norm.k": norm[1]}
    check_tensors(x=x, **weights)
    for name, weight in weights.items():
        if weight.shape != (head_dim,) or weight.dtype not in (x.dtype, torch.float32):
            raise ValueError(
                f"{name} {tuple(weight.shape)}, {weight.dtype} must be [{head_dim}], one number per element of a head, of {x.dtype} or float32"
            )
    eps = check_number("norm.eps", norm[2])
    if eps < 0.0:
        raise ValueError(f"norm.eps={eps} must not be negative; try 1e-5")
    return QKNorm(norm[0].contiguous(), norm[1].contiguous(), eps)


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
    check_angles("mixed", mixed, angles, positions, head_dim)


def check_angles(name: str, x: torch.Tensor, angles: torch.Tensor, positions: torch.Tensor, head_dim: int) -> None:
    """Raises ValueError unless angles and positions fit the tokens of x, which messages call `name`."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even and at least 2: RoPE rotates pairs")
    if positions.shape != x.shape[:1] or positions.dtype not in INTEGERS:
        raise ValueError(
            f"positions {tuple(positions.shape)}, {positions.dtype} must be one integer for each of {x.shape[0]} tokens "
            f"of {name}, int64 or int32"
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
