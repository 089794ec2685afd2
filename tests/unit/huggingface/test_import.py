"""Imported Llamas compute what transformers computes, whatever becomes of the gate; folders that do not fit get one sentence."""

from pathlib import Path

import pytest
import torch

from ssa_pretrain.config import Config, Method, Score
from ssa_pretrain.errors import WeightsError
from ssa_pretrain.huggingface.importing import imported_config, read_record
from ssa_pretrain.huggingface.options import Gate, ImportOptions
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.settings.problems import ConfigError
from support.errors import relative
from support.foreign_llama import HEADS, LLAMA3_ROPE, SIZES, llama_record, random_tensors, released_record, write_folder
from support.imported import import_to, training_logits

DOCUMENT_LENGTHS = (1, 15, 17, 64, 301)


def logits(config: Config, run: Path, placement: Placement, mode: str) -> torch.Tensor:
    return training_logits(config, run, placement, mode, random_documents())


def random_documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(SIZES["vocab_size"], (length,), generator=generator) for length in DOCUMENT_LENGTHS]


@pytest.mark.parametrize("rope", [None, LLAMA3_ROPE])
def test_imported_llama_gives_the_logits_of_transformers_with_and_without_gates(tmp_path, placement, rope):
    from transformers import LlamaForCausalLM

    folder = write_folder(tmp_path / "llama", llama_record(rope=rope), random_tensors())
    with torch.no_grad():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        wanted = torch.stack([model(d.unsqueeze(0)).logits[0, -1] for d in random_documents()])
    off = logits(import_to(folder, tmp_path / "off", gate=Gate.off), tmp_path / "off", placement, "full")
    opened = logits(import_to(folder, tmp_path / "open", gate=Gate.open), tmp_path / "open", placement, "full")
    assert relative(off, wanted) < 1e-5
    assert relative(opened, off) < 1e-5
    sparse = logits(import_to(folder, tmp_path / "sparse", gate=Gate.off), tmp_path / "sparse", placement, "sparse")
    assert relative(sparse[-1], wanted[-1]) > 1e-2, "the comparison sees what attention does"


def test_imported_qwen3_gives_the_logits_of_transformers(tmp_path, placement):
    """QK-norm by another implementation, whose own defaults (RoPE's base, epsilon) its config.json names."""
    from transformers import Qwen3ForCausalLM

    record = llama_record(theta=1e6) | {"model_type": "qwen3", "rms_norm_eps": 1e-6, "use_sliding_window": False}
    folder = write_folder(tmp_path / "qwen3", record, random_tensors(qk_norm=True))
    with torch.no_grad():
        model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        wanted = torch.stack([model(d.unsqueeze(0)).logits[0, -1] for d in random_documents()])
    config = import_to(folder, tmp_path / "run", gate=Gate.off)
    assert config.model.qk_norm and (config.model.rope_theta, config.model.norm_eps) == (1e6, 1e-6)
    found = logits(config, tmp_path / "run", placement, "full")
    assert relative(found, wanted) < 1e-5


def test_padding_of_the_vocabulary_is_rows_of_zeros(tmp_path, placement):
    folder = write_folder(tmp_path / "llama", llama_record(), random_tensors())
    plain = logits(import_to(folder, tmp_path / "a", gate=Gate.off), tmp_path / "a", placement, "full")
    config = import_to(folder, tmp_path / "b", gate=Gate.off, vocab_divisor=64)
    padded = logits(config, tmp_path / "b", placement, "full")
    assert (plain.shape[1], padded.shape[1]) == (96, 128)
    assert not padded[:, 96:].any()
    assert torch.allclose(padded[:, :96], plain, rtol=1e-5, atol=1e-6)


def test_released_layout_keeps_the_second_gate_of_each_head(tmp_path, placement):
    tensors = random_tensors(gate_rows=3, tied=True)
    folder = write_folder(tmp_path / "ssa", released_record(), tensors)
    config = import_to(folder, tmp_path / "run")
    assert (config.attention.gate, config.attention.score, config.attention.top_k) == (True, Score.official_compat, 4)
    assert config.data.sequence_length == SIZES["max_position_embeddings"]
    first = logits(config, tmp_path / "run", placement, "sparse")
    for name in tensors:
        if "g_proj" in name:  # the rows of the other branches are not read
            rows = torch.arange(3 * HEADS) % 3
            tensors[name] = torch.where((rows == 1)[:, None], tensors[name], 7.0)
    folder = write_folder(tmp_path / "other", released_record(), tensors)
    second = logits(import_to(folder, tmp_path / "run2"), tmp_path / "run2", placement, "sparse")
    assert torch.equal(first, second)
    tensors["model.layers.0.self_attn.g_proj.weight"][3 * 2 + 1] += 1.0  # the gate of head 2
    folder = write_folder(tmp_path / "third", released_record(), tensors)
    third = logits(import_to(folder, tmp_path / "run3"), tmp_path / "run3", placement, "sparse")
    assert not torch.equal(first, third)
    config = import_to(folder, tmp_path / "full", method=Method.full)
    assert (config.attention.method, config.attention.alignment_weight) == (Method.full, 0.0)


def test_tensors_that_do_not_fit_config_json(tmp_path, placement):
    def message(record: dict, tensors: dict[str, torch.Tensor]) -> str:
        folder = write_folder(tmp_path / str(len(list(tmp_path.iterdir()))), record, tensors)
        with pytest.raises(WeightsError) as caught:
            import_to(folder, tmp_path / "out", gate=Gate.off)
        assert not (tmp_path / "out").exists()
        return str(caught.value).replace(str(folder), "DIR")

    tensors = random_tensors()
    q = "model.layers.0.self_attn.q_proj.weight"
    assert message(llama_record(), {k: v for k, v in tensors.items() if k != q}) == (
        f"DIR lacks {q}, which its config.json needs; is a file of weights missing?"
    )
    assert message(llama_record(), tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(4)}) == (
        "DIR holds model.layers.0.self_attn.q_proj.bias, which the model of its config.json does not have; import a dense Llama"
    )
    assert message(llama_record() | {"num_attention_heads": 8}, tensors) == (
        "DIR has model.layers.0.self_attn.o_proj.weight with shape (32, 64), and its config.json makes it (32, 128); correct config.json"
    )
    assert message(llama_record() | {"vocab_size": 97}, tensors) == (
        "DIR has lm_head.weight with shape (96, 32), and its config.json makes it (97, 32); correct config.json"
    )
    assert message(llama_record(tied=True), tensors) == (
        "DIR has tie_word_embeddings=true and an lm_head.weight that differs from model.embed_tokens.weight; "
        "set it to false in config.json if the output layer has weights of its own"
    )
    assert message(llama_record(), random_tensors(tied=True)) == (
        "DIR has tie_word_embeddings=false and no lm_head.weight; set it to true if the embedding serves as both"
    )


def test_tied_output_that_was_saved_twice_and_tables_of_rope_are_left_out(tmp_path, placement):
    tensors = random_tensors(tied=True)
    more = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    more["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    folder = write_folder(tmp_path / "llama", llama_record(tied=True), tensors | more)
    assert import_to(folder, tmp_path / "run", gate=Gate.off).model.tie_embeddings


def test_settings_that_do_not_fit_the_model():
    def message(record: dict, **settings) -> str:
        with pytest.raises(ConfigError) as caught:
            imported_config(SIZES | record, ImportOptions(out="x", **settings))
        return str(caught.value).strip()

    assert message(llama_record()) == (
        "gate must be chosen: a Llama has no attention gate; try gate=off (no gate) or gate=open (the same function with a gate that learns)"
    )
    assert message(released_record(), gate=Gate.off) == (
        "gate=off is a choice for Llamas without one, and model_type=llama-nsa settles it; leave it out"
    )
    assert message(llama_record() | {"num_key_value_heads": 3}, gate=Gate.off) == (
        "model.num_kv_heads=3 must divide model.num_attention_heads=4; try 2 or 4"
    )
    assert message(released_record(window_size=128)).startswith("window_size=128 is a sliding window, which NSA has")


def test_folders_without_a_model(tmp_path):
    with pytest.raises(
        WeightsError, match=r"is not a Hugging Face model \(config\.json: .*\); give a folder with config\.json"
    ):
        read_record(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="does not hold settings; give a folder with a model's config"):
        read_record(tmp_path)
