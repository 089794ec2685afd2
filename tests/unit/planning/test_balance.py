"""The balance of the data ranks: the required bound, and a count by hand."""

import pytest

from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.planning.balance import Batch, balance
from ssa_pretrain.planning.flops import row_flops
from ssa_pretrain.planning.plan import make_plan
from ssa_pretrain.planning.table import describe


def found(dp: int, num_microbatches: int, rows: int, *overrides: str, steps: int = 32):
    config = resolve_config("plan", ["experiment=ssa_1b_8k", *overrides], Machine(world_size=1, has_files=False))
    length = config.data.sequence_length
    batch = Batch(dp=dp, num_microbatches=num_microbatches, rows=rows, row_length=length)
    row = row_flops(config.model, config.attention, [length])
    return balance(config.attention, batch, row, seed=config.seed, steps=steps)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
@pytest.mark.parametrize(
    ("dp", "num_microbatches", "rows"), [(1, 384, 1), (8, 24, 2), (64, 6, 1), (64, 3, 2), (128, 3, 1), (512, 8, 1)]
)
def test_data_ranks_have_equal_work(share: float, dp: int, num_microbatches: int, rows: int) -> None:
    result = found(dp, num_microbatches, rows, f"attention.counterpart_share={share}")
    # At 1/8 a rank with one row of the full kind draws one pair of the sparse stream or two.
    assert result.slowest == pytest.approx(1.0, abs=5e-3 if share == 0.125 else 1e-12)
    assert result.same_stream == 1.0
    assert result.changes <= 2.0 or dp == 1


@pytest.mark.parametrize("share", [0.3, 0.125, 0.1, 1 / 16])
@pytest.mark.parametrize(("dp", "num_microbatches", "rows"), [(64, 6, 1), (64, 3, 2), (128, 3, 1), (8, 24, 2)])
def test_shares_that_no_row_can_have_exactly_leave_little_imbalance(
    share: float, dp: int, num_microbatches: int, rows: int
) -> None:
    """A rank's rows are within one pair of their share."""
    setting = f"attention.counterpart_share={share}"
    assert 1.0 <= found(dp, num_microbatches, rows, setting, steps=8).slowest < 1.01


def test_one_microbatch_per_rank_by_hand() -> None:
    """Half of the ranks are full. Without a counterpart the slowest rank has the cost of a full row."""
    config = resolve_config(
        "plan", ["experiment=ssa_1b_8k", "attention.counterpart_share=0"], Machine(world_size=1, has_files=False)
    )
    row = row_flops(config.model, config.attention, [8192])
    full, sparse = row.computed("full", 0.0), row.computed("sparse", 0.0)
    result = found(8, 1, 1, "attention.counterpart_share=0")
    assert result.slowest == pytest.approx(full / ((full + sparse) / 2)) and result.slowest > 1.05
    assert (result.same_stream, result.changes) == (0.0, 0.0)


def test_drawing_by_step_is_balanced() -> None:
    result = found(8, 1, 1, "attention.stream_draw=step")
    assert result.slowest == pytest.approx(1.0) and (result.same_stream, result.changes) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("overrides", "world_size", "words"),
    [
        (
            (),
            64,
            "balance    the slowest data rank computes 0.0% more than the mean; all data ranks have the same main",
        ),
        (("parallel=pp2",), 128, "in 100% of the slots, with 1"),
        (("parallel=pp2",), 2, "balance    the main stream of the microbatches has "),
        (("training.micro_batch_size=1",), 384, "the slowest data rank computes 8.2% more than the mean"),
    ],
)
def test_plan_shows_the_balance(overrides: tuple[str, ...], world_size: int, words: str) -> None:
    share = "attention.counterpart_share=0.25"
    config = resolve_config(
        "plan", ["experiment=ssa_1b_8k", share, *overrides], Machine(world_size=world_size, has_files=False)
    )
    table = describe(config, make_plan(config, world_size))
    assert words in table
    assert "the other stream on 0.25 of the queries" in table


@pytest.mark.parametrize(("method", "world_size"), [("full", 64), ("moba", 64), ("ssa", 1)])
def test_plan_without_anything_to_balance_says_nothing(method: str, world_size: int) -> None:
    config = resolve_config("plan", [f"experiment={method}_1b_8k"], Machine(world_size=world_size, has_files=False))
    assert "balance" not in describe(config, make_plan(config, world_size))
