"""The hash finds every single flipped bit, and the ranks that differ are named by majority."""

import pytest
import torch

from ssa_pretrain.engine import replicas
from ssa_pretrain.engine.replicas import MULTIPLIER, bit_hashes, describe, odd_numbers


def bit_hash(tensor: torch.Tensor) -> int:
    """Returns one tensor's hash, beside another tensor."""
    hashes = bit_hashes([torch.ones(3), tensor, torch.zeros(2)])
    assert hashes[2] == 0
    return int(hashes[1])


INTEGER = {
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.uint8: torch.uint8,
}


def expected(bits: list[int], chunk: int) -> int:
    """Returns the hash by Python's integers, as a signed 64-bit number."""
    weights = odd_numbers(chunk, torch.device("cpu")).tolist()
    terms = (value * weights[i % chunk] * MULTIPLIER ** (i // chunk) for i, value in enumerate(bits))
    total = sum(terms) % 2**64
    return total - 2**64 if total >= 2**63 else total


def test_factors_are_odd_and_all_different():
    weights = odd_numbers(100_000, torch.device("cpu"))
    assert (weights % 2).abs().min() == 1
    assert len(weights.unique()) == len(weights)


@pytest.mark.parametrize("dtype", INTEGER)
@pytest.mark.parametrize("chunk", [4, 7, 1000])
def test_hash_equals_its_formula_at_any_chunk(monkeypatch, dtype, chunk):
    monkeypatch.setitem(replicas.CHUNKS, "cpu", chunk)
    tensor = (torch.randn(5, 6, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)
    bits = tensor.reshape(-1).view(INTEGER[dtype]).tolist()
    assert bit_hash(tensor) == expected(bits, chunk)
    assert bit_hash(tensor.T) == expected(tensor.T.reshape(-1).view(INTEGER[dtype]).tolist(), chunk)


@pytest.mark.parametrize("dtype", INTEGER)
def test_every_single_bit_changes_the_hash(monkeypatch, dtype):
    monkeypatch.setitem(replicas.CHUNKS, "cpu", 5)
    bits = torch.zeros(13, dtype=INTEGER[dtype])
    bits[::2] = 77
    before, seen = bit_hash(bits.view(dtype)), set()
    for i in range(len(bits)):
        for bit in range(8 * bits.element_size()):
            mask = torch.tensor(1 << bit, dtype=torch.uint64 if bits.element_size() == 8 else torch.int64)
            changed = bits.clone()
            changed[i] ^= mask.view(torch.int64).to(bits.dtype)
            assert not torch.equal(changed, bits)
            seen.add(bit_hash(changed.view(dtype)))
    assert before not in seen


def test_sign_of_zero_and_bits_of_nan_count():
    assert bit_hash(torch.tensor([0.0])) != bit_hash(torch.tensor([-0.0]))
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert bit_hash(nans[:1]) != bit_hash(nans[1:])


def test_swapped_elements_change_the_hash():
    tensor = torch.arange(10.0)
    assert bit_hash(tensor) != bit_hash(tensor.flip(0))


NAMES = ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("hashes", "text"),
    [
        ([[1, 2], [1, 2], [1, 2]], ""),
        ([[1, 2], [1, 2], [1, 3]], "r2 differs from the others in b"),
        ([[9, 2], [1, 2], [1, 3]], "r0 differs from the others in a, r2 differs from the others in b"),
        ([[1, 2], [1, 3]], "r0 and r1 differ in b, and their number does not show which is right"),
        (
            [[1, 2], [1, 2], [1, 3], [1, 3]],
            "r0, r1, r2 and r3 differ in b, and their number does not show which is right",
        ),
        ([[0] * 5, [1] * 5, [1] * 5], "r0 differs from the others in a, b, c and 2 more"),
    ],
)
def test_ranks_are_named_by_majority(hashes, text):
    assert describe(NAMES[: len(hashes[0])], hashes, [f"r{n}" for n in range(len(hashes))]) == text
