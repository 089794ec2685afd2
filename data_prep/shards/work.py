"""The work of a run: a corpus together with its tokenizer, and the job of each shard."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.config import Config
from data_prep.corpus.corpus import Corpus
from data_prep.progress import Log
from data_prep.shards.shard import Job, shard_fingerprint
from data_prep.tokenizer.backends import HuggingFaceBackend
from data_prep.tokenizer.encoding import Vocabulary
from data_prep.tokenizer.vocabulary import prepare_vocabulary


@dataclass(frozen=True, slots=True)
class Work:
    """All that determines the bytes of the shards."""

    corpus: Corpus
    vocabulary: Vocabulary
    hf_backend: HuggingFaceBackend | None  # the tokenizer, if it had to be loaded
    jobs: list[Job]  # every shard of the corpus


def plan_work(config: Config, out: Path, corpus: Corpus, log: Log) -> Work:
    """Returns the jobs of a corpus, after training, converting or finding its tokenizer."""
    vocabulary, hf_backend = prepare_vocabulary(config, corpus.shards, corpus.inputs, out / "work")
    log(f"tokenizer: {vocabulary.name}, {vocabulary.vocab_size:,} entries")
    jobs = [
        Job(shard, shard_fingerprint(text, vocabulary, config.split))
        for shard, text in zip(corpus.shards, corpus.inputs, strict=True)
    ]
    return Work(corpus, vocabulary, hf_backend, jobs)
