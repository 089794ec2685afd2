"""The settings of data_prep as typed dataclasses; conf/ holds the YAML that fills them.

Every dataclass checks itself and returns its problems as sentences, so that one run reports all of them together. Source and
tokenizer are unions: the Hydra group picks the dataclass. No file is opened here; what needs a look at the disk is checked
where it is read.
"""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from data_prep.run_config import (
    MergeConfig,
    MixConfig,
    OnError,
    Packing,
    PackingConfig,
    StatsConfig,
)


class Specials(Enum):
    """What becomes of a special token's name when it occurs literally in a document."""

    text = "text"  # encoded like any other characters: nobody's text can end a document
    control = "control"  # becomes the special id


class Stage(Enum):
    """What a run does. Each of the first six needs what those before it left, and does nothing where that is done."""

    plan = "plan"  # what will be made, and what it costs
    fetch = "fetch"  # brings the text to this machine
    tokenize = "tokenize"  # text to shards, each with a record
    merge = "merge"  # shards to a bounded number of files, and the manifest
    validate = "validate"  # reads every byte of the dataset in `out` and reports what is wrong with it
    stats = "stats"  # figures and a page about the dataset in `out`
    prepare = "prepare"  # plan to merge: text to a finished dataset
    all = "all"  # the six in their order


class BackendChoice(Enum):
    """Which program encodes; the bytes written do not depend on it."""

    auto = "auto"  # the first of gigatoken, tiktoken that is installed and gives hf's ids on a sample of the corpus, else hf
    gigatoken = "gigatoken"  # the same, but a mistake where it cannot be used
    tiktoken = "tiktoken"  # likewise
    hf = "hf"  # Hugging Face's tokenizers


class Verify(Enum):
    """How much of a finished dataset is compared with its manifest before it is reused."""

    quick = "quick"  # existence, sizes, headers
    full = "full"  # and the sha256 of every file


@dataclass(kw_only=True, slots=True)
class QuickstartSource:
    """English and Python that pip alone provides; about 13 MB."""

    kind: str = "quickstart"  # the kind of source that was chosen, by source=
    entries_per_page: int = 8  # encyclopaedia entries of one topic joined into a document; 1 leaves them apart
    english_docs_mb: float = 2.5  # most MB of documentation prose taken from installed Python packages
    python_mb: float = 6.0  # most MB of Python source taken from installed packages

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        found = []
        if self.entries_per_page < 1:
            found.append(f"source.entries_per_page={self.entries_per_page} must be at least 1; try 8")
        if not self.english_docs_mb >= 0:
            found.append(f"source.english_docs_mb={self.english_docs_mb} must not be negative; try 2.5, or 0 for none")
        if not self.python_mb > 0:
            found.append(f"source.python_mb={self.python_mb} must be positive; try 6")
        return found


@dataclass(kw_only=True, slots=True)
class LocalDocsSource:
    """Documentation packages of Debian or Ubuntu, and Python source from this machine; 70 MB by default."""

    kind: str = "local_docs"  # the kind of source that was chosen, by source=
    packages: list[str] = field(
        default_factory=list
    )  # Debian packages; data_prep/sources/packages/recipes.py has those it can read
    wheels: list[str] = field(default_factory=list)  # Python packages, name==version, of which the source is text
    python_mb: float = (
        10.0  # most MB of Python source, from `wheels`, or without them from what is installed; 0 for none
    )
    keep_out: list[str] = field(default_factory=list)  # packages and wheels whose text is held out: no overlap is kept

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        found = []
        if not self.packages and not self.wheels:
            found.append("source.packages=[] and source.wheels=[] must name at least one package; try [perl-doc]")
        if not self.python_mb >= 0:
            found.append(f"source.python_mb={self.python_mb} must not be negative; try 10, or 0 for none")
        for pin in self.wheels:
            if not all(pin.partition("==")):
                found.append(f"source.wheels: {pin} names no version; write it as {pin.partition('==')[0]}==1.2.3")
        for name in sorted({*self.packages, *self.wheels} & set(self.keep_out)):
            found.append(f"source.keep_out holds {name} out, and the corpus takes it; remove it from one of the two")
        return found


@dataclass(kw_only=True, slots=True)
class JsonlSource:
    """JSON lines, plain or compressed (.gz, .zst): one object a line, one document an object."""

    kind: str = "jsonl"  # the kind of source that was chosen, by source=
    name: str = "text"  # name of this part of the corpus; files of the dataset are called after it
    paths: list[str] = MISSING  # files, folders or glob patterns
    text_column: str = "text"  # key of the text in each object
    on_error: OnError = OnError.fail  # what becomes of lines, rows and files that cannot be read as text

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        return _named_paths(self.name, self.paths) + _text_column(self.text_column)


@dataclass(kw_only=True, slots=True)
class ParquetSource:
    """Parquet files, one document a row."""

    kind: str = "parquet"  # the kind of source that was chosen, by source=
    name: str = "text"  # name of this part of the corpus; files of the dataset are called after it
    paths: list[str] = MISSING  # files, folders or glob patterns
    text_column: str = "text"  # column of the text; must be a string column
    on_error: OnError = OnError.fail  # what becomes of lines, rows and files that cannot be read as text

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        return _named_paths(self.name, self.paths) + _text_column(self.text_column)


@dataclass(kw_only=True, slots=True)
class TextSource:
    """Plain UTF-8 files, one document a file."""

    kind: str = "text"  # the kind of source that was chosen, by source=
    name: str = "text"  # name of this part of the corpus; files of the dataset are called after it
    paths: list[str] = MISSING  # files, folders or glob patterns
    suffixes: list[str] = field(default_factory=lambda: [".txt", ".md", ".rst", ".py"])  # which files of a folder count
    on_error: OnError = OnError.fail  # what becomes of lines, rows and files that cannot be read as text

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        found = _named_paths(self.name, self.paths)
        if not self.suffixes:
            found.append("source.suffixes=[] must name at least one suffix; try [.txt]")
        return found


@dataclass(kw_only=True, slots=True)
class BpeTokenizer:
    """A byte-level BPE trained on the train split of the corpus itself."""

    kind: str = "bpe"  # the kind of tokenizer that was chosen, by tokenizer=
    vocab_size: int = 8192  # entries, special tokens included
    sample_mb: float = 12.0  # most MB of train documents to learn from, chosen by document hash

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        found = []
        if not 512 <= self.vocab_size <= 1_000_000:
            found.append(f"tokenizer.vocab_size={self.vocab_size} must be from 512 to 1000000; try 8192")
        if not self.sample_mb > 0:
            found.append(f"tokenizer.sample_mb={self.sample_mb} must be positive; try 12")
        return found


@dataclass(kw_only=True, slots=True)
class Llama3Tokenizer:
    """Llama 3's tokenizer, converted from the tokenizer.model that Meta's llama-models package ships."""

    kind: str = "llama3"  # the kind of tokenizer that was chosen, by tokenizer=
    path: str | None = None  # a tokenizer.model elsewhere; null looks into the installed package llama-models

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        return []


@dataclass(kw_only=True, slots=True)
class FileTokenizer:
    """Any tokenizer.json of Hugging Face's `tokenizers`."""

    kind: str = "file"  # the kind of tokenizer that was chosen, by tokenizer=
    path: str = MISSING  # the tokenizer.json
    eos_token: str = MISSING  # token that ends a document, as written in the file
    bos_token: str | None = None  # token that begins a document; needed only by policy.add_bos

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        return []


@dataclass(kw_only=True, slots=True)
class PolicyConfig:
    """What is added to a document's ids, and what is never taken from its text."""

    add_bos: bool = False  # begin each document with the BOS id
    append_eos: bool = True  # end each document with the EOS id; training finds document boundaries by it
    specials: Specials = Specials.text  # what a special token's name in the text becomes

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        if not self.append_eos:
            return ["policy.append_eos=false leaves no mark between documents, which training needs; set it to true"]
        return []


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    """Which documents are held out: those whose hash falls below a threshold, so equal texts share a side."""

    heldout_fraction: float = 0.02  # share of the documents; 1 makes a dataset for measuring alone
    seed: int = 0  # another seed holds out other documents

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, one sentence each."""
        if not 0 <= self.heldout_fraction <= 1:
            return [f"split.heldout_fraction={self.heldout_fraction} must be from 0 to 1; try 0.02"]
        return []


@dataclass(kw_only=True, slots=True)
class Config:
    """Everything that one run of data_prep is told."""

    stage: Stage = Stage.all
    out: str = MISSING  # folder of the dataset
    cache: str = "outputs/cache/data_prep"  # folder of downloads and converted tokenizers, shared by datasets
    source: Any = MISSING  # where the text comes from
    tokenizer: Any = MISSING  # what makes ids of it
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    executor: Any = MISSING  # where the work runs
    stats: StatsConfig = field(default_factory=StatsConfig)
    shard_mb: float = (
        0.0  # MB of input of one shard, the unit of work and of resuming; 0 chooses by the size of the corpus
    )
    backend: BackendChoice = BackendChoice.auto  # which program encodes; the bytes written do not depend on it
    workers: int = 0  # processes of executor=local; 0 takes one a core; the bytes written do not depend on it
    overwrite: bool = False  # replace a finished dataset in `out` that was made with other settings or inputs
    verify: Verify = Verify.quick  # how a finished dataset is checked before it is reused
    retokenize: int = 200  # documents that stage=validate encodes again where the text is still there; 0 for none

    def problems(self) -> list[str]:
        """Returns what is wrong with the whole configuration, one sentence each."""
        found = []
        if not self.out.strip():
            found.append("out= must name a folder; try out=outputs/data")
        if self.shard_mb and not 0.001 <= self.shard_mb < math.inf:
            found.append(f"shard_mb={self.shard_mb} must be at least 0.001; try 64, or 0 to let the corpus decide")
        if self.workers < 0:
            found.append(f"workers={self.workers} must not be negative; try 0 for one a core")
        if self.retokenize < 0:
            found.append(f"retokenize={self.retokenize} must not be negative; try 200, or 0 for none")
        sections = (self.source, self.tokenizer, self.policy, self.split, self.packing, self.mix, self.merge)
        for section in (*sections, self.executor, self.stats):
            found += section.problems()
        if self.packing.kind is Packing.official_row and self.policy.add_bos:
            found.append("packing=official_row writes no BOS, as the published code; set policy.add_bos=false")
        if self.split.heldout_fraction == 1 and self.tokenizer.kind == "bpe":
            found.append(
                "split.heldout_fraction=1 leaves no text to train a tokenizer on; name the one of the training data with "
                "tokenizer=file tokenizer.path=…/tokenizer.json, or tokenizer=llama3"
            )
        if self.split.heldout_fraction == 1 and self.mix.target_tokens:
            found.append("split.heldout_fraction=1 makes no train tokens to count; leave mix.target_tokens at 0")
        if self.policy.add_bos and self.tokenizer.kind == "file" and self.tokenizer.bos_token is None:
            found.append("policy.add_bos=true needs tokenizer.bos_token; name the token or set policy.add_bos=false")
        return found


def _named_paths(name: str, paths: list[str]) -> list[str]:
    found = []
    if not name or not all(c.isalnum() or c in "-_" for c in name):
        found.append(f"source.name={name!r} must be made of letters, digits, - and _; try text")
    if not paths:
        found.append("source.paths=[] must name at least one file, folder or pattern; try 'source.paths=[my_folder]'")
    return found


def _text_column(column: str) -> list[str]:
    return [] if column else ["source.text_column= must not be empty; try text"]
