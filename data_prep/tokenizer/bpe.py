"""A small byte-level BPE, trained on the train split of the corpus at hand.

A vocabulary of 128,256 would dominate a small model: at width 256 its embedding has 33 million parameters. Texts are
cut into words by Llama 3's pattern, so that results carry over. Training is deterministic: the sample is chosen by
document hash and read in the order of the plan, and the trainer breaks ties by token id.
"""

from collections.abc import Iterator

import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.config import BpeTokenizer, SplitConfig
from data_prep.corpus.planning import Shard
from data_prep.corpus.splitting import is_heldout, unit_hash
from data_prep.files import digest
from data_prep.readers import read_piece

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"

# Source: llama-models 0.3.0, llama_models/llama3/tokenizer.py, `pat_str`.
WORD_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(tokenizer: Tokenizer) -> Tokenizer:
    """Sets Llama 3's word pattern and a byte-level alphabet in a tokenizer and returns it."""
    words = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, alphabet])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def training_key(config: BpeTokenizer, split: SplitConfig, inputs: list[str]) -> str:
    """Returns the sha256 of all that determines the trained tokenizer; `inputs` are the shards' input digests."""
    return digest(
        [
            "bpe",
            1,
            tokenizers.__version__,
            config.vocab_size,
            config.sample_mb,
            split.heldout_fraction,
            split.seed,
            inputs,
        ]
    )


def train_bpe(config: BpeTokenizer, split: SplitConfig, shards: list[Shard]) -> str:
    """Returns the JSON of a tokenizer trained on the train documents of the plan.

    Raises:
        InputError: the text cannot be read.
    """
    tokenizer = byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(config, split, shards), trainer)
    return tokenizer.to_str()


def _sample(config: BpeTokenizer, split: SplitConfig, shards: list[Shard]) -> Iterator[str]:
    share = config.sample_mb * 1e6 / max(1, sum(shard.size for shard in shards))
    for shard in shards:
        for piece in shard.pieces:
            for text, raw in read_piece(piece, _ignore):
                if not is_heldout(raw, split) and unit_hash(raw, "bpe sample") < share:
                    yield text


def _ignore(_: int) -> None:
    pass
