"""ssa_pretrain/engine/megatron/skipping.py on a CPU: flagged steps change nothing and count nowhere, for both kinds of optimizer.

torch's fused AdamW takes the flag on a CPU too. Transformer Engine's FusedAdam needs a GPU (tests/gpu/test_skipped_step.py). Here a stand-in has its
interface, and its kernels are AdamW in plain torch, with the arguments that Transformer Engine's take.
"""

import itertools

import pytest
import torch
from torch import Tensor

from ssa_pretrain.engine.finite import first_not_finite
from ssa_pretrain.engine.megatron.skipping import SkipFlag

CPU = torch.device("cpu")
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def adamw(tensors: list[list[Tensor]], rate, beta1, beta2, epsilon, step, decay: float) -> None:
    """Updates fp32 weights and moments in place: AdamW with bias correction, rate and step as numbers or tensors of one element."""
    for g, p, m, v in zip(*tensors, strict=True):
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + epsilon) + decay * p
        p.copy_(p - rate * update)


class FusedAdamStandIn:
    """The parts of Transformer Engine's FusedAdam that a step uses: the host counts steps, one kernel call per group."""

    capturable = master_weights = False

    def __init__(self, groups: list[list[Tensor]]) -> None:
        self.param_groups = [{"params": params} for params in groups]
        self.state = {p: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)} for g in groups for p in g}

    def step(self) -> None:
        """Updates each group; the flag that the kernel gets is FusedAdam's own, which is never set."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = group["params"]
            tensors = [[p.grad for p in params], params]
            tensors += [[self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq")]
            own = torch.zeros(1, dtype=torch.int32)
            self.multi_tensor_adam(2048 * 32, own, tensors, 1e-2, 0.9, 0.95, 1e-8, group["step"], 1, 1, 0.1)

    @staticmethod
    @torch.no_grad()
    def multi_tensor_adam(_chunk, _flag, tensors, lr, beta1, beta2, eps, step, mode, correction, decay) -> None:
        """The kernel without a flag."""
        assert type(lr) is float and type(step) is int and (mode, correction) == (1, 1)
        adamw(tensors, lr, beta1, beta2, eps, step, decay)

    @staticmethod
    @torch.no_grad()
    def multi_tensor_adam_capturable(
        _chunk, flag, tensors, lr, beta1, beta2, eps, step, mode, correction, decay, scale
    ) -> None:
        """The kernel that returns at once if the flag is set; rate, step and the gradients' scale are on the device."""
        assert (
            lr.dtype == scale.dtype == torch.float32 and step.dtype == flag.dtype == torch.int32 and float(scale) == 1.0
        )
        assert (mode, correction) == (1, 1)
        if int(flag) != 1:
            adamw(tensors, lr, beta1, beta2, eps, step, decay)


def weights() -> list[list[Tensor]]:
    """Returns two groups of weights."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)],
        [torch.randn(4, generator=generator)],
    ]


def build(kind: str):
    """Returns a new optimizer of the kind over the same weights."""
    if kind == "fused_adam":
        return FusedAdamStandIn(weights())
    return torch.optim.AdamW([{"params": group} for group in weights()], **SETTINGS)


def step(optimizer, flag: SkipFlag | None, number: int, skip: bool) -> None:
    """Takes a step over gradients that depend on the number only; skipped ones are NaN."""
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
            if skip:
                p.grad.fill_(torch.nan)
    if flag is not None:
        flag.set(torch.tensor(skip))
    optimizer.step()


def tensors(optimizer) -> list[Tensor]:
    """Returns copies of the weights and moments."""
    found = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return found + [s[name].clone() for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]


def counts(optimizer) -> set[int]:
    """Returns Adam's step counts."""
    groups = {int(group["step"]) for group in optimizer.param_groups if "step" in group}
    return groups or {int(state["step"]) for state in optimizer.state.values()}


@pytest.mark.parametrize("settles", [(), (2,), (1, 3, 4)])
@pytest.mark.parametrize("kind", ["fused_adam", "torch"])
def test_flagged_steps_change_no_bit_and_count_nowhere(kind, settles):
    """Steps 1, 3, 4 and 6 are flagged; the count is settled, as before a checkpoint, after any of them."""
    optimizer, plain = build(kind), build(kind)
    flag, last = SkipFlag(optimizer, CPU), SkipFlag(plain, CPU) if kind == "torch" else None
    before, flagged = [], (True, False, True, True, False, True, False)
    for number, skip in enumerate(flagged, 1):
        step(optimizer, flag, number, skip)
        if not skip:
            step(plain, last, number, skip)
        if number in settles:
            flag.settle()
            assert counts(optimizer) == {flagged[:number].count(False)}
        before.append(tensors(optimizer))
    same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(before)]
    assert same == list(flagged[1:])
    flag.settle()
    assert counts(optimizer) == counts(plain) == {3}
    for one, other in zip(tensors(optimizer), tensors(plain), strict=True):
        assert torch.allclose(one, other, rtol=4 * torch.finfo(torch.float32).eps, atol=1e-8)
    assert first_not_finite(("", tensor) for tensor in tensors(optimizer)) is None


def test_torch_is_fused_again_after_loading():
    """A checkpoint's groups may say otherwise, and its step counts may be on the CPU."""
    optimizer = build("torch")
    flag = SkipFlag(optimizer, CPU)
    step(optimizer, flag, 1, False)
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = None, None
    flag.prepare()
    before = tensors(optimizer)
    step(optimizer, flag, 2, True)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(optimizer), strict=True)) and counts(optimizer) == {1}


def test_other_optimizers_are_refused():
    with pytest.raises(TypeError, match="SGD has no update that a flag on the device can skip"):
        SkipFlag(torch.optim.SGD(weights()[0], lr=0.1), CPU)


def test_first_tensor_with_a_bad_value_is_named():
    good, empty, whole = torch.ones(3, dtype=torch.bfloat16), torch.empty(0), torch.arange(3)
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = torch.zeros(1000)
        bad[617] = value
        assert first_not_finite([("a", good), ("b", empty), ("c", whole), ("d", bad), ("e", bad)]) == "d"
    assert first_not_finite([("a", good), ("b", empty), ("c", whole)]) is None
    assert first_not_finite([("huge", torch.full((9,), 3e38))]) is None
