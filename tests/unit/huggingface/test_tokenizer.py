"""The exported tokenizer adds exactly the special tokens that the model was trained with, whatever the dataset's tokenizer.json adds."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from ssa_pretrain.errors import DataError
from ssa_pretrain.huggingface.settings import SpecialTokens
from ssa_pretrain.huggingface.tokenizer import dataset_tokenizer, write_tokenizer
from support.small_datasets import write_dataset

WORDS = {"<s>": 0, "</s>": 1, "one": 2, "two": 3}


@pytest.fixture
def dataset(tmp_path):
    """Returns a function that writes a dataset whose tokenizer puts BOS before every text by itself."""

    def write(*, bos_id: int | None = 0, **policy):
        manifest = write_dataset(tmp_path / "data", {"a": [np.arange(4)]}, {"a": [np.arange(4)]}, policy=policy)
        tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="two"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens(["<s>", "</s>"])
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.enable_truncation(2)
        tokenizer.save(str(tmp_path / "data/tokenizer.json"))
        known = dataclasses.replace(manifest.tokenizer, eos_id=1, bos_id=bos_id)
        (tmp_path / "data/manifest.json").write_text(dataclasses.replace(manifest, tokenizer=known).to_json())
        return tmp_path / "data"

    return write


@pytest.mark.parametrize(
    ("policy", "add_bos", "bos"),
    [({}, None, None), ({"add_bos": True}, None, 0), ({"add_bos": True}, False, None), ({"add_bos": False}, True, 0)],
)
def test_bos_is_added_as_in_training_or_as_asked(dataset, tmp_path, policy, add_bos, bos):
    from transformers import AutoTokenizer

    found = dataset_tokenizer(dataset(append_eos=True, **policy), add_bos)
    assert found.tokens == SpecialTokens(eos=1, bos=bos)
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(out, found, 512)
    text = "one two one"
    before = [] if bos is None else [0]
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode(text).ids == [*before, 2, 3, 2]
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded(text).input_ids == [*before, 2, 3, 2]
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (bos, 1, 1)
    assert (loaded.model_max_length, loaded.padding_side) == (512, "left")
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is (bos is not None)
    assert settings["add_eos_token"] is False


def test_eos_that_no_document_ended_with_is_left_out(dataset):
    assert dataset_tokenizer(dataset(append_eos=False), None).tokens.eos is None


def test_datasets_without_a_tokenizer(dataset, tmp_path):
    data = dataset(bos_id=None)
    with pytest.raises(
        DataError, match=r"add_bos=true needs a tokenizer with BOS, and that of .* has none; leave add_bos out"
    ):
        dataset_tokenizer(data, True)
    (data / "tokenizer.json").unlink()
    with pytest.raises(
        DataError, match="is missing; name the folder of the dataset with data=DIR, or leave the tokenizer out"
    ):
        dataset_tokenizer(data, None)
    with pytest.raises(DataError, match=r"gives no tokenizer \(.*\); name the folder of the dataset, or data=none"):
        dataset_tokenizer(tmp_path / "none", None)
