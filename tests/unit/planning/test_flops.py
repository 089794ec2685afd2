"""FLOP counts against sums by hand and brute force; peaks by device name."""

import pytest

from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config import AttentionConfig, Config, ModelConfig, PrecisionName
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.planning.flops import RowFlops, causal_pairs, peak_flops, row_flops, sparse_pairs


def experiment(*overrides: str) -> Config:
    return resolve_config("plan", overrides, Machine(world_size=1, has_files=False))


def flops(config: Config, lengths: list[int] | None = None) -> RowFlops:
    return row_flops(config.model, config.attention, lengths or [config.data.sequence_length])


def test_flops_of_the_1b_model_at_8k_by_hand() -> None:
    """Llama 1B: per token 2 operations per weight, the vocabulary once; causal attention over (T + 1) / 2 keys on average."""
    row = flops(experiment("experiment=full_1b_8k"))
    layer = 2048 * (32 * 64) + 2 * 2048 * (2 * 64) + 2048 * 32 + (32 * 64) * 2048 + 3 * 2048 * 8192
    assert row.linear == 8192 * 16 * 2 * layer == 8192 * 16 * 2 * 59_310_080
    assert row.logits == 8192 * 2 * 2048 * 128_256
    assert row.full_attention == 16 * 32 * (2 * 2 * 64) * (8192 * 8193 / 2)
    assert row.sparse_attention == row.selection == 0
    assert row.model == 3 * (row.linear + row.logits + row.full_attention)
    assert row.model / 8192 == pytest.approx(8.881e9, rel=1e-3)


def test_flops_agree_with_a_published_measurement() -> None:
    """Plain GPTModel, 1B, 8k: 54.4k tokens/s were counted as 483 TFLOP/s with causal attention."""
    row = flops(experiment("experiment=full_1b_8k", "attention.gate=false"))
    assert 54.4e3 * row.model / 8192 == pytest.approx(483e12, rel=2e-3)


def visited(length: int, block_size: int, top_k: int) -> tuple[int, int]:
    """Returns the pairs of the sparse stream and the (query, candidate block) pairs of selection, counted query by query."""
    pairs = candidates = 0
    for token in range(length):
        own = token // block_size
        pairs += token - own * block_size + 1 + min(own, top_k - 1) * block_size
        candidates += own
    return pairs, candidates


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 256, 257, 1000])
@pytest.mark.parametrize(("block_size", "top_k"), [(16, 1), (16, 2), (16, 16), (32, 5), (128, 3)])
def test_pairs_equal_brute_force(length: int, block_size: int, top_k: int) -> None:
    pairs, candidates = visited(length, block_size, top_k)
    assert sparse_pairs(length, block_size, top_k) == pairs
    assert causal_pairs(length) == sum(token + 1 for token in range(length))
    assert sparse_pairs(length, block_size, 10_000) == causal_pairs(length)
    attention = AttentionConfig(block_size=block_size, top_k=top_k)
    row = row_flops(ModelConfig(num_attention_heads=4, num_kv_heads=2, head_dim=32), attention, [length], 4096)
    means, logits_and_softmax = length * 2 * 32, candidates * 4 * (2 * 32 + 3)
    assert row.selection == 4 * (means + logits_and_softmax)


def test_each_document_is_counted_separately() -> None:
    config = experiment("experiment=ssa_1b_8k")
    whole, halves = flops(config, [8192]), flops(config, [4096, 4096])
    assert halves.linear == whole.linear
    assert halves.full_attention == pytest.approx(whole.full_attention / 2, rel=1e-3)
    one = flops(config, [4096])
    assert halves.sparse_attention == 2 * one.sparse_attention
    assert halves.selection == 2 * one.selection


def test_mfu_counts_one_stream_and_ssa_overhead_is_separate() -> None:
    ssa, full, moba = (flops(experiment(f"experiment={name}_1b_8k")) for name in ("ssa", "full", "moba"))
    assert ssa.model == full.model
    assert ssa.overhead == pytest.approx(3 * (ssa.sparse_attention + ssa.gate + ssa.alignment) + ssa.selection)
    assert full.overhead == 3 * full.gate == 3 * 8192 * 2048 * 16
    assert ssa.alignment == (7 + 1) * 8192 * 2048 * 16, "the terms and the second stream's gate"
    assert moba.full_attention == 0
    assert moba.model == 3 * (moba.linear + moba.logits + moba.sparse_attention)
    assert moba.sparse_attention == ssa.sparse_attention
    # 15 whole blocks and half of the own block, of 4,096.5 keys; the first 240 tokens of a document read fewer.
    assert ssa.sparse_attention / ssa.full_attention == pytest.approx((15 * 16 + 8.5) / 4096.5, rel=0.02)


def test_key_convolution_is_overhead_and_qk_norm_is_not_counted() -> None:
    plain, options = (
        flops(experiment("experiment=ssa_1b_8k", *more))
        for more in ((), ("attention.key_convolution=3", "model.qk_norm=true"))
    )
    assert options.key_convolution == 16 * 8192 * 128 * (3 + 2 + 3), "three products, two sums; sigmoid, product, sum"
    assert options.model == plain.model
    assert options.overhead - plain.overhead == pytest.approx(3 * options.key_convolution)
    assert options.computed("full", 1.0) - plain.computed("full", 1.0) == pytest.approx(3 * options.key_convolution)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("lengths", [[8192], [256, 1000, 6936], [200] * 40])
def test_all_operations_are_those_of_the_model_and_of_the_method(
    share: float, ratio: float, lengths: list[int]
) -> None:
    """The mean over the main streams of what is computed, and the counts by hand for either stream."""
    overrides = (f"attention.counterpart_share={share}", f"attention.full_ratio={ratio}")
    row = flops(experiment("experiment=ssa_1b_8k", *overrides), lengths)
    mean = ratio * row.computed("full", row.share_if_full) + (1 - ratio) * row.computed("sparse", row.share_if_sparse)
    assert ratio * row.share_if_full + (1 - ratio) * row.share_if_sparse == pytest.approx(share)
    assert row.model + row.overhead == pytest.approx(mean, rel=1e-12)
    always = 3 * (row.linear + row.logits + row.gate)
    full, sparse, aligned = row.full_attention, row.sparse_attention, share * row.alignment
    reach = sum(causal_pairs(min(length, 256)) for length in lengths)
    left_out = 4 * 2048 * 16 * reach if share < 1 or lengths[0] == 200 else 0
    assert row.covered == left_out
    assert row.computed("full", share) == pytest.approx(
        always + 3 * (full + share * (sparse - left_out) + aligned) + share * row.selection
    )
    assert row.computed("sparse", share) == pytest.approx(
        always + 3 * (sparse + share * (full - left_out) + aligned) + row.selection
    )


def test_mfu_counts_the_full_stream_where_it_is_computed() -> None:
    row = flops(experiment("experiment=ssa_1b_8k", "attention.counterpart_share=0.25", "attention.full_ratio=0.5"))
    full = 0.5 + 0.5 * 0.125
    attention = full * row.full_attention + (1 - full) * row.sparse_attention
    assert row.model == pytest.approx(3 * (row.linear + row.logits + attention))


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "fp8", 1978.9e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 66.9e12),
        ("NVIDIA H100 PCIe", "bf16", 756.5e12),
        ("NVIDIA H100 NVL", "bf16", 835.5e12),
        ("NVIDIA H200", "bf16", 989.4e12),
        ("NVIDIA H20", "bf16", 148e12),
        ("NVIDIA GH200 480GB", "bf16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA L40S", "bf16", 362.05e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA B300 SXM6 AC", "bf16", 2250e12),
        ("NVIDIA GB300", "fp8", 5000e12),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "bf16", 500e12),
        ("AMD Instinct MI300X", "bf16", 1307.4e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("Intel(R) Xeon(R) Platinum", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_peak_flops_by_device_name(name: str, precision: str, peak: float | None) -> None:
    assert peak_flops(name, PrecisionName(precision)) == (None if peak is None else pytest.approx(peak))


def pairs_to_choose_for(length: int, reach: int) -> int:
    """Returns the (query, key) pairs of the queries after the first `reach`, counted query by query."""
    return sum(token + 1 for token in range(reach, length))


def test_operations_of_a_trained_scorer_by_hand() -> None:
    """1B: 32 query heads, 2 kv heads with an index head each, D 64; blocks of 128 x 16 reach 2,048 keys."""
    row = flops(experiment("experiment=indexer_1b_8k"))
    pairs = pairs_to_choose_for(8192, 2048)
    assert row.selection == 16 * pairs * 2 * (2 * 64 + 3)
    assert row.index_projection == 16 * 8192 * 2 * 2048 * (2 * 2 * 64)
    assert row.distillation == 16 * pairs * (32 * (2 * 64 + 3) + 2 * (6 * 64 + 6))
    assert row.model == 3 * (row.linear + row.logits + row.sparse_attention)
    extra = row.selection + 2 * row.index_projection + 0.125 * row.distillation + 3 * row.gate
    assert row.overhead == pytest.approx(extra) == pytest.approx(row.computed("sparse", 0.125) - row.model)
    warm_up = row.model + 3 * (row.full_attention - row.sparse_attention + row.gate) + 2 * row.index_projection
    assert row.computed("full", 0.375) == pytest.approx(warm_up + 0.375 * row.distillation)
    inside, plain = (flops(experiment("experiment=ssa_1b_8k", *score)) for score in (["attention.score=indexer"], []))
    added = inside.selection - plain.selection + 2 * inside.index_projection + inside.distillation
    assert inside.model == plain.model and inside.overhead - plain.overhead == pytest.approx(added)
