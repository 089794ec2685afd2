"""A quick check before anything is timed: times of wrong kernels mean nothing.

It uses one small packed batch of ragged documents and the package's references in float64, which the tests verify. Outputs and gradients may
deviate as far as bf16 operands allow. Selection is compared with its reference on the same bf16 operands: chosen blocks may differ only
where scores are nearly equal. The fused layer and full attention over equal rows are covered by the tests only.
"""

import torch

from ssa_kernels import (
    compressed_attention,
    full_attention,
    gate_and_align,
    select_blocks,
    sparse_attention,
    window_attention,
)
from ssa_kernels.documents import build_layout

# bf16 rounds to 2^-9 relative; operands, P and the output are each rounded once or twice, gradients once more.
OUTPUT_TOLERANCE = 6e-3
GRADIENT_TOLERANCE = 1.2e-2
# Share of queries whose choice may differ from the reference's: two orders of float32 sums swap nearly equal scores.
CHOICE_TOLERANCE = 2e-3


def failures(heads: int = 32, kv_heads: int = 2, head_dim: int = 64) -> list[str]:
    """Returns a sentence per wrong result; empty if everything is correct."""
    lengths = [1, 15, 16, 17, 700, 275, 1024]
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    tokens = sum(lengths)
    layout = build_layout(ends, num_tokens=tokens, block_size=16)
    generator = torch.Generator("cuda").manual_seed(7)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=generator, dtype=torch.bfloat16)

    q, grad = draw(tokens, heads, head_dim), draw(tokens, heads, head_dim)
    k, v = draw(tokens, kv_heads, head_dim), draw(tokens, kv_heads, head_dim)
    found = []
    chosen = select_blocks(q, k, block_size=16, top_k=16, cu_seqlens=layout)
    exact = select_blocks(q, k, block_size=16, top_k=16, cu_seqlens=layout, impl="reference")
    differ = (chosen != exact).any(-1).double().mean().item()
    if differ > CHOICE_TOLERANCE:
        found.append(f"select_blocks: {differ:.2%} of the choices differ from the reference's")

    def sparse(*x, impl=None):
        return (sparse_attention(*x, chosen, block_size=16, cu_seqlens=layout, impl=impl)[0],)

    def full(*x, impl=None):
        return (full_attention(*x, cu_seqlens=layout, impl=impl)[0],)

    def window(*x, impl=None):
        return (window_attention(*x, window=128, cu_seqlens=layout, impl=impl)[0],)

    def compressed(*x, impl=None):
        return (compressed_attention(*x, block_size=16, cu_seqlens=layout, impl=impl)[0],)

    def gate(*x, impl=None):
        return gate_and_align(*x, main="sparse", impl=impl)

    found += _compare("sparse_attention", sparse, (q, k, v), (grad,))
    found += _compare("full_attention", full, (q, k, v), (grad,))
    found += _compare("window_attention", window, (q, k, v), (grad,))
    found += _compare("compressed_attention", compressed, (q, k, v), (grad,))
    gate_inputs = (q, draw(tokens, heads, head_dim), draw(tokens, heads))
    # The loss is a mean: a gradient of its number of terms gives both outputs the same weight.
    return found + _compare("gate_and_align", gate, gate_inputs, (grad, torch.tensor(float(q.numel()), device="cuda")))


def _compare(name: str, operator, inputs: tuple[torch.Tensor, ...], grads: tuple[torch.Tensor, ...]) -> list[str]:
    ours = _run(operator, inputs, grads, None)
    exact = _run(operator, tuple(x.double() for x in inputs), tuple(x.double() for x in grads), "reference")
    found = []
    for index, (got, want) in enumerate(zip(ours, exact, strict=True)):
        error = ((got.double() - want).norm() / want.norm()).item()
        what, limit = f"gradient {index - len(grads) + 1}", GRADIENT_TOLERANCE
        if index < len(grads):
            what, limit = f"output {index + 1}", OUTPUT_TOLERANCE
        if not error <= limit:  # catches NaN too
            found.append(f"{name}: {what} is off by {error:.1e} > {limit:.1e}")
    return found


def _run(operator, inputs, grads, impl) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outs = operator(*leaves, impl=impl)
    torch.autograd.backward(outs, [g.to(out.dtype) for g, out in zip(grads, outs, strict=True)])
    return [*(out.detach() for out in outs), *(x.grad for x in leaves)]
