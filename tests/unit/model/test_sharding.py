"""model/sharding.py: how each parameter is cut for tensor ranks and joined. layout_worker.py compares the dims with megatron-core's."""

import pytest
import torch

from ssa_pretrain.model.sharding import global_name, join, part, partition_dim, whole_shape

LAYER = "decoder.layers.10."
ROWS = ("embedding.word_embeddings.weight", f"{LAYER}self_attention.linear_qkv.weight", "output_layer.weight")
COLUMNS = (f"{LAYER}self_attention.linear_proj.weight", f"{LAYER}mlp.linear_fc2.weight")
PAIRED = f"{LAYER}mlp.linear_fc1.weight"
NORMS = (
    f"{LAYER}input_layernorm.weight",
    f"{LAYER}pre_mlp_layernorm.weight",
    f"{LAYER}self_attention.linear_qkv.layer_norm_weight",
    f"{LAYER}mlp.linear_fc1.layer_norm_weight",
    "decoder.final_layernorm.weight",
)


def whole(name: str) -> torch.Tensor:
    return torch.arange(8.0) if name in NORMS else torch.arange(96.0).view(8, 12)


@pytest.mark.parametrize("name", ROWS)
def test_most_matrices_are_cut_by_rows(name):
    assert partition_dim(name) == 0
    assert torch.equal(part(name, whole(name), 2, 1), whole(name)[4:])


@pytest.mark.parametrize("name", COLUMNS)
def test_projections_back_to_the_model_dim_are_cut_by_columns(name):
    assert partition_dim(name) == 1
    assert torch.equal(part(name, whole(name), 2, 1), whole(name)[:, 6:])


def test_gate_and_up_projection_are_cut_separately():
    assert partition_dim(PAIRED) == 0
    assert torch.equal(part(PAIRED, whole(PAIRED), 2, 1), whole(PAIRED)[[2, 3, 6, 7]])


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_whole_on_every_rank(name):
    assert partition_dim(name) is None
    assert torch.equal(part(name, whole(name), 2, 1), whole(name))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", [*ROWS, *COLUMNS, PAIRED, *NORMS])
def test_joining_reverses_cutting(name, tp):
    parts = [part(name, whole(name), tp, rank) for rank in range(tp)]
    assert torch.equal(join(name, parts), whole(name))
    assert whole_shape(name, parts[0].shape, tp) == whole(name).shape


def test_names_count_layers_over_all_stages_and_a_tied_output_layer_uses_the_embedding_name():
    assert global_name("decoder.layers.2.mlp.linear_fc1.weight", 8, tied=True) == PAIRED
    assert global_name("output_layer.weight", 8, tied=True) == "embedding.word_embeddings.weight"
    assert global_name("output_layer.weight", 8, tied=False) == "output_layer.weight"
