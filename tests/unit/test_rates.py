"""The learning rate as a chain of pieces: the old schedules to the bit, WSD and lists of pieces at their ends, and the steps of the batch."""

import dataclasses
import math

import pytest

from ssa_pretrain.config import (
    Batches,
    BatchStepConfig,
    OptimConfig,
    PieceConfig,
    Schedule,
    Shape,
    TrainingConfig,
    batches,
    piece_bounds,
)
from ssa_pretrain.rates import describe_pieces, learning_rate, rate_pieces


@dataclasses.dataclass
class Length:
    """The fields of a plan that a schedule reads."""

    steps: int
    warmup_steps: int = 0
    batches: Batches = dataclasses.field(default_factory=lambda: Batches(((0, 100),)))


def formula(step: int, optim: OptimConfig, steps: int, warmup: int) -> float:
    """The schedules as they were before pieces: their rates may not change by a bit."""
    if step < warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    if optim.schedule is Schedule.constant:
        return optim.lr
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    share = 1.0 - progress if optim.schedule is Schedule.linear else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.min_lr + (optim.lr - optim.min_lr) * share


@pytest.mark.parametrize("schedule", [Schedule.cosine, Schedule.linear, Schedule.constant])
def test_schedules_without_pieces_are_bit_identical(schedule: Schedule) -> None:
    for steps, warmup in ((1, 0), (1, 1), (2, 1), (10, 10), (300, 15), (997, 31)):
        for lr, min_lr in ((3e-4, 0.0), (1e-3, 1e-4), (0.7, 0.7)):
            optim = OptimConfig(lr=lr, min_lr=min_lr, schedule=schedule)
            for step in range(steps):
                assert learning_rate(step, optim, Length(steps, warmup)) == formula(step, optim, steps, warmup)


def test_wsd_warms_up_stays_and_decays() -> None:
    optim = OptimConfig(lr=0.4, min_lr=0.1, schedule=Schedule.wsd, decay_fraction=0.25)
    rates = [learning_rate(step, optim, Length(100, 4)) for step in range(101)]
    assert rates[:4] == pytest.approx([0.08, 0.16, 0.24, 0.32])
    assert rates[4:76] == [0.4] * 72, "the decay begins at the peak"
    assert rates[76:101] == pytest.approx([0.4 - 0.3 * n / 25 for n in range(1, 26)])
    by_root = dataclasses.replace(optim, decay_shape=Shape.sqrt)
    assert learning_rate(84, by_root, Length(100, 4)) == pytest.approx(0.1 + 0.3 * (1 - math.sqrt(9 / 25)))


def test_pieces_chain_where_they_end() -> None:
    pieces = [
        PieceConfig(steps=4),
        PieceConfig(to=1.0, shape=Shape.constant),
        PieceConfig(fraction=0.2, to=0.5, shape=Shape.cosine),
        PieceConfig(tokens=1000, to=0.0),
    ]
    optim, plan = OptimConfig(lr=0.4, pieces=pieces), Length(100)
    assert [(p.first, p.steps) for p in rate_pieces(optim, plan)] == [(0, 4), (4, 66), (70, 20), (90, 10)]
    rates = [learning_rate(step, optim, plan) for step in range(102)]
    assert rates[0] > 0 and rates[4] == rates[70] == 0.4
    assert rates[80] == pytest.approx(0.3) and rates[90] == pytest.approx(0.2) and rates[95] == pytest.approx(0.1)
    assert rates[99] > 0 and rates[100] == rates[101] == 0.0
    same = OptimConfig(lr=0.4, schedule=Schedule.wsd)
    spelled = [PieceConfig(fraction=0.1), PieceConfig(shape=Shape.constant), PieceConfig(fraction=0.2, to=0.0)]
    for step in range(100):  # a named schedule is its pieces
        assert learning_rate(step, OptimConfig(lr=0.4, pieces=spelled), plan) == learning_rate(
            step, same, Length(100, 10)
        )


def test_fractions_do_not_add_up_their_rounding() -> None:
    thirds = [PieceConfig(fraction=1 / 3, to=to) for to in (1.0, 0.5, 0.0)]
    assert piece_bounds(thirds, 100, Batches(((0, 1),))) == [0, 33, 67, 100]


def test_batches_count_tokens_and_steps_exactly() -> None:
    """Against a list of every step's batch."""
    training = TrainingConfig(
        global_batch_tokens=30,
        total_tokens=5001,
        batch_steps=[
            BatchStepConfig(step=11, global_batch_tokens=50),
            BatchStepConfig(tokens=1500, global_batch_tokens=110),
        ],
    )
    assert not training.problems()
    sizes = batches(training)
    listed: list[int] = []
    while sum(listed) < 5001:
        listed.append(30 if len(listed) < 10 else 50 if sum(listed) < 1500 else 110)
    assert training.num_steps() == len(listed)
    assert [sizes.tokens_at(step) for step in range(len(listed))] == listed
    before = [sum(listed[:step]) for step in range(len(listed) + 1)]
    assert [sizes.tokens_before(step) for step in range(len(listed) + 1)] == before
    for tokens in range(0, 5001, 7):
        assert sizes.steps_for(tokens) == next(step for step, count in enumerate(before) if count >= tokens)
    ends = piece_bounds([PieceConfig(tokens=1000), PieceConfig(), PieceConfig(tokens=1200)], len(listed), sizes)
    assert before[ends[1]] >= 1000 > before[ends[1] - 1]
    assert before[-1] - before[ends[2]] <= 1200 < before[-1] - before[ends[2] - 1]


def test_one_batch_is_the_same_arithmetic_as_ever() -> None:
    for tokens, batch in ((1, 3), (3, 3), (10**12, 3_145_728), (7, 10)):
        assert TrainingConfig(total_tokens=tokens, global_batch_tokens=batch).num_steps() == -(-tokens // batch)
    assert Batches(((0, 7),)).tokens_before(10**9) == 7 * 10**9


def test_pieces_are_described_for_people() -> None:
    optim = OptimConfig(lr=1e-3, schedule=Schedule.wsd)
    assert describe_pieces(rate_pieces(optim, Length(1000, 10)), Batches(((0, 1000), (500, 2000)))) == [
        "steps 1 to 10 (10.0k tokens): from 0 to 0.001, linear",
        "steps 11 to 800 (1.09M tokens): 0.001, constant",
        "steps 801 to 1,000 (400k tokens): from 0.001 to 0, linear",
    ]
