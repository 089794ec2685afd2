"""The modelling file of exported folders against the training model, on the same weights."""

import pytest
import torch

from ssa_pretrain.config import Config, IndexerConfig, PrecisionName, Score
from ssa_pretrain.huggingface.modelling_ssa import SSALlamaForCausalLM
from support.errors import require_as_near
from support.hf_models import TrainingModel, draw_documents, hf_model, padded, small_config

LENGTHS = [1, 15, 16, 97, 131]


@pytest.fixture(scope="module")
def placement():
    """One process."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


def require_equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Fails unless fp32 logits differ by at most 1e-5 of the largest: padding on the left turns RoPE further, which rounds differently."""
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-5 * float(wanted.abs().max()))


def config_of(case: str) -> Config:
    """Returns the training configuration of a case."""
    attention = {"no_gate": {"gate": False}, "per_head": {"score": Score.per_head}, "one_block": {"top_k": 1}}
    attention["official"] = {"score": Score.official_compat, "top_k": 4}
    attention["qk_norm"] = {"qk_norm": True}
    attention["indexer"] = {"score": Score.indexer, "indexer": IndexerConfig(heads=2)}
    attention["convolution"] = {"key_convolution": 5, "qk_norm": True}
    attention["convolution_per_head"] = {"key_convolution": 3, "score": Score.per_head, "gate": False}
    config = small_config(**attention.get(case, {}))
    config.model.tie_embeddings = case != "untied"
    config.model.rope_scaling.enabled = case == "llama3"
    return config


@pytest.mark.parametrize(
    "case",
    [
        "tied",
        "untied",
        "no_gate",
        "per_head",
        "official",
        "one_block",
        "llama3",
        "qk_norm",
        "indexer",
        "convolution",
        "convolution_per_head",
    ],
)
def test_logits_equal_the_training_models(placement, case):
    """At odd lengths, alone and in batches padded on the left, on the right and on both sides, by sdpa and eager."""
    trained = TrainingModel(config_of(case), placement)
    documents = draw_documents(LENGTHS)
    width = max(LENGTHS) + 9
    batches = [
        padded(documents, left=left, width=width) for left in ([0] * 5, [width - n for n in LENGTHS], [5, 3, 7, 17, 4])
    ]
    model, streams = hf_model(trained), []
    for mode in ("full", "sparse"):
        model.config.attention_mode = mode
        wanted = trained.logits(documents, mode)
        streams.append(wanted[-1])
        with torch.no_grad():
            for document, logits in zip(documents, wanted, strict=True):
                require_equal(model(document[None]).logits[0], logits)
            for implementation in ("sdpa", "eager"):
                model.set_attn_implementation(implementation)
                for tokens, mask in batches:
                    found = model(tokens, attention_mask=mask).logits
                    assert found.isfinite().all(), "padding too"
                    for row, logits in enumerate(wanted):
                        require_equal(found[row][mask[row] == 1], logits)
    assert (streams[0] - streams[1]).abs().max() > 0.1, "the streams must differ, or the test proves nothing"


def in_dtype(model: SSALlamaForCausalLM, dtype: torch.dtype) -> SSALlamaForCausalLM:
    """Returns the model with its weights in a dtype, as from_pretrained loads them. `model.to(dtype)` would round RoPE's frequencies too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_bf16_is_as_near_to_float64_as_training_in_bf16(placement, mode):
    config = small_config()
    config.precision.name = PrecisionName.bf16
    trained = TrainingModel(config, placement)
    documents = draw_documents([97, 131, 200])
    tokens, mask = padded(documents, left=[200 - len(d) for d in documents], width=200)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate passes them
    logits = []
    for dtype in (torch.float64, torch.bfloat16):
        model = in_dtype(hf_model(trained, attention_mode=mode), dtype)
        with torch.no_grad():
            logits.append(model(tokens, attention_mask=mask, position_ids=positions).logits[mask == 1])
    exact, found = logits
    require_as_near(found, torch.cat(trained.logits(documents, mode)), exact, factor=1.25, name=f"{mode} logits")
