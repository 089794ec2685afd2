"""The map of tensors: where each row goes, both directions together, and the names and shapes of a model that was built."""

import pytest
import torch

from ssa_pretrain.huggingface.weights import (
    Llama,
    from_hugging_face,
    tensor_names,
    tensor_shapes,
    to_hugging_face,
    training_shapes,
)
from ssa_pretrain.parallel.state import joined
from support.layout_worker import VOCAB, configure


def llama(
    *, gates: int = 1, tied: bool = True, qk_norm: bool = False, index_heads: int = 0, key_taps: int = 0
) -> Llama:
    return Llama(
        num_layers=2,
        hidden_size=5,
        ffn_hidden_size=7,
        vocab_size=11,
        num_heads=6,
        num_kv_heads=2,
        head_dim=4,
        gates=gates,
        tied=tied,
        qk_norm=qk_norm,
        index_heads=index_heads,
        key_taps=key_taps,
    )


def test_rows_of_the_projection_by_group_go_to_their_heads():
    """Each row of linear_qkv is labelled by what it is: (kind, head, place in the head)."""
    sizes = llama()
    labels = []
    for group in range(2):
        labels += [(0, 3 * group + head, place) for head in range(3) for place in range(4)]
        labels += [(1, group, place) for place in range(4)] + [(2, group, place) for place in range(4)]
        labels += [(3, 3 * group + head, 0) for head in range(3)]
    qkv = torch.tensor(labels, dtype=torch.float32)
    parts = to_hugging_face("decoder.layers.1.self_attention.linear_qkv.weight", qkv, sizes)
    assert list(parts) == [f"model.layers.1.self_attn.{letter}_proj.weight" for letter in "qkvg"]
    wanted = [(0, 6, 4), (1, 2, 4), (2, 2, 4), (3, 6, 1)]
    for (kind, heads, width), part in zip(wanted, parts.values(), strict=True):
        assert part.tolist() == [[kind, head, place] for head in range(heads) for place in range(width)]


def test_rows_of_the_scorer_by_group_go_to_their_heads():
    labels = []
    for group in range(2):
        labels += [(0, 3 * group + head, place) for head in range(3) for place in range(4)]
        labels += [(1, group, place) for place in range(4)]
    rows = torch.tensor(labels, dtype=torch.float32)
    parts = to_hugging_face("decoder.layers.1.self_attention.linear_index.weight", rows, llama(index_heads=3))
    assert list(parts) == [f"model.layers.1.self_attn.index_{letter}_proj.weight" for letter in "qk"]
    for kind, (heads, part) in enumerate(zip((6, 2), parts.values(), strict=True)):
        assert part.tolist() == [[kind, head, place] for head in range(heads) for place in range(4)]


def test_halves_of_the_feed_forward_are_gate_then_up():
    fc1 = torch.arange(14.0).unsqueeze(1).expand(14, 5)
    parts = to_hugging_face("decoder.layers.0.mlp.linear_fc1.weight", fc1, llama())
    assert {name: part[:, 0].tolist() for name, part in parts.items()} == {
        "model.layers.0.mlp.gate_proj.weight": list(range(7)),
        "model.layers.0.mlp.up_proj.weight": list(range(7, 14)),
    }


@pytest.mark.parametrize(("gates", "tied"), [(1, True), (1, False), (0, True), (0, False), (3, True)])
def test_both_directions_together_give_the_same_bits(gates, tied):
    sizes = llama(gates=gates, tied=tied, qk_norm=tied, index_heads=3 * (not tied), key_taps=3 * (gates == 1))
    generator = torch.Generator().manual_seed(0)
    shapes, out = training_shapes(sizes), {}
    ours = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, tensor in ours.items():
        out |= to_hugging_face(name, tensor, sizes)
    assert {name: tuple(tensor.shape) for name, tensor in out.items()} == tensor_shapes(sizes)
    assert len(out) == sum(map(len, tensor_names(sizes).values())), "no name twice"
    assert all(torch.equal(from_hugging_face(name, out, sizes), tensor) for name, tensor in ours.items())
    assert ("lm_head.weight" in out) is not tied
    assert any("g_proj" in name for name in out) is bool(gates)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.qk_norm": True},
        {"model.tie_embeddings": False, "attention.gate": False},
        {"attention.method": "nsa", "attention.score": "compressed"},
        {"attention.score": "indexer", "attention.indexer.heads": 2},
        {"attention.key_convolution": 5},
    ],
)
def test_names_and_shapes_are_those_of_a_model_that_was_built(overrides):
    from ssa_pretrain.checkpoint.sharded_weights import named_weights
    from ssa_pretrain.model.spec import build_model

    config = configure({"model.num_layers": 2, **overrides})
    with joined(config.parallel, seed=1) as placement:
        model = build_model(config, VOCAB, placement.groups)
        built = {name: tuple(parameter.shape) for name, parameter in named_weights([model], config)}
    assert training_shapes(Llama.of(config, config.model.padded_vocab_size(VOCAB))) == built
