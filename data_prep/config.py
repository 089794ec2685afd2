"""The settings of data_prep as typed dataclasses, which conf/ fills from YAML.

Every dataclass returns its own problems, so that one run reports all of them together. Source, tokenizer and executor are unions: the Hydra
group picks the dataclass by its `kind`. No file is opened here. What depends on files is checked where they are read.
The settings of sources are in sources/settings.py, those of the amount, shape and place of the work in run_config.py.
"""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from data_prep.run_config import (
    LocalExecutor,
    MergeConfig,
    MixConfig,
    Packing,
    PackingConfig,
    RayExecutor,
    SlurmExecutor,
    StatsConfig,
)
from data_prep.sources.settings import AnySource
from ssa_pretrain.settings.problems import Problem, above_zero, at_least, between


class Specials(Enum):
    """How the name of a special token is encoded when it occurs literally in a document."""

    text = "text"  # as ordinary text, so no text can end a document
    control = "control"  # as the special id


class Stage(Enum):
    """What a run does. Each of the first six needs the results of those before it, and skips finished work."""

    plan = "plan"  # prints the shards that will be made and their size
    fetch = "fetch"  # fetches the text to this machine
    tokenize = "tokenize"  # makes shards from text, each with a record
    merge = "merge"  # joins shards into a bounded number of files and writes the manifest
    validate = "validate"  # reads every byte of the dataset in `out` and reports problems
    stats = "stats"  # writes statistics of the dataset in `out` and a page that shows them
    prepare = "prepare"  # plan to merge: text to a finished dataset
    all = "all"  # the six, in order


class BackendChoice(Enum):
    """Which library encodes; the bytes written do not depend on it."""

    auto = "auto"  # the first of gigatoken and tiktoken that is installed and gives hf's ids on a sample of the corpus, else hf
    gigatoken = "gigatoken"  # gigatoken; an error if it cannot be used
    tiktoken = "tiktoken"  # tiktoken; an error if it cannot be used
    hf = "hf"  # Hugging Face's tokenizers


class Verify(Enum):
    """How much of a finished dataset is compared with its manifest before it is reused."""

    quick = "quick"  # existence, sizes, headers
    full = "full"  # as quick, and the sha256 of every file


@dataclass(kw_only=True, slots=True)
class BpeTokenizer:
    """A byte-level BPE trained on the train split of the corpus itself."""

    kind: str = "bpe"  # the kind of tokenizer, set by tokenizer=
    vocab_size: int = 8192  # entries, including special tokens
    sample_mb: float = 12.0  # maximum MB of train documents to learn from, chosen by document hash

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        found = between("tokenizer", self, 512, 1_000_000, "vocab_size")
        return found + above_zero("tokenizer", self, "sample_mb")


@dataclass(kw_only=True, slots=True)
class Llama3Tokenizer:
    """Llama 3's tokenizer, converted from the tokenizer.model that Meta's llama-models package ships."""

    kind: str = "llama3"  # the kind of tokenizer, set by tokenizer=
    path: str | None = None  # a tokenizer.model; null takes the one of the installed package llama-models

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        return []


@dataclass(kw_only=True, slots=True)
class FileTokenizer:
    """Any tokenizer.json of Hugging Face's `tokenizers`."""

    kind: str = "file"  # the kind of tokenizer, set by tokenizer=
    path: str = MISSING  # the tokenizer.json
    eos_token: str = MISSING  # token that ends a document, as written in the file
    bos_token: str | None = None  # token that begins a document; needed only by policy.add_bos

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        return []


@dataclass(kw_only=True, slots=True)
class PolicyConfig:
    """Which ids are added to a document, and how names of special tokens in its text are encoded."""

    add_bos: bool = False  # begin each document with the BOS id
    append_eos: bool = True  # end each document with the EOS id; training finds document boundaries by it
    specials: Specials = Specials.text  # how the name of a special token in the text is encoded

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        if not self.append_eos:
            rule = "leaves nothing between documents, and training finds their boundaries by the EOS id"
            return [Problem("policy.append_eos", self.append_eos, rule, "try true")]
        return []


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    """Which documents are held out: those whose hash is below a threshold, so equal texts are in the same split."""

    heldout_fraction: float = 0.02  # share of the documents; 1 makes a dataset for evaluation only
    seed: int = 0  # which documents are held out

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        return between("split", self, 0.0, 1.0, "heldout_fraction")


@dataclass(kw_only=True, slots=True)
class Config:
    """All settings of a run of data_prep."""

    stage: Stage = Stage.all
    out: str = MISSING  # folder of the dataset
    cache: str = "outputs/cache/data_prep"  # folder of downloads and converted tokenizers, which datasets share
    source: AnySource = MISSING  # where the text comes from
    tokenizer: BpeTokenizer | Llama3Tokenizer | FileTokenizer = MISSING  # how it becomes ids
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    executor: LocalExecutor | SlurmExecutor | RayExecutor = MISSING  # where the work runs
    stats: StatsConfig = field(default_factory=StatsConfig)
    shard_mb: float = 0.0  # MB of input per shard, the unit of work and of resuming; 0 derives it from the corpus
    backend: BackendChoice = BackendChoice.auto  # which library encodes; the bytes written do not depend on it
    workers: int = 0  # processes of executor=local; 0 takes one per core; the bytes written do not depend on it
    overwrite: bool = False  # replace a finished dataset in `out` that was made from other settings or text
    verify: Verify = Verify.quick  # how thoroughly a finished dataset is checked before it is reused
    retokenize: int = 200  # documents that stage=validate encodes again if their text still exists; 0 for none

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the whole configuration."""
        found = at_least("", self, 0, "workers", "retokenize")
        if not self.out.strip():
            found.append(Problem("out", self.out, "must name a folder", "try outputs/data"))
        if self.shard_mb and self.shard_mb < 0.001:
            advice = "try 64, or 0 to let the corpus decide"
            found.append(Problem("shard_mb", self.shard_mb, "must be at least 0.001", advice))
        sections = (self.source, self.tokenizer, self.policy, self.split, self.packing, self.mix, self.merge)
        for section in (*sections, self.executor, self.stats):
            found += section.problems()
        return found + self._across_sections()

    def _across_sections(self) -> list[Problem]:
        """Returns the problems that involve several sections."""
        found, heldout = [], self.split.heldout_fraction
        if self.packing.kind is Packing.official_row and self.policy.add_bos:
            rule = "contradicts packing=official_row, which writes no BOS, like the published code"
            found.append(Problem("policy.add_bos", True, rule, "try false", ("packing.kind",)))
        if heldout == 1 and self.tokenizer.kind == "bpe":
            advice = "use the one of the training data with tokenizer=file tokenizer.path=…/tokenizer.json, or tokenizer=llama3"
            rule = "leaves no text to train a tokenizer on"
            found.append(Problem("split.heldout_fraction", heldout, rule, advice, ("tokenizer.kind",)))
        if heldout == 1 and self.mix.target_tokens:
            rule = "counts tokens of the train split, and split.heldout_fraction=1 makes none"
            reads = ("split.heldout_fraction",)
            found.append(Problem("mix.target_tokens", self.mix.target_tokens, rule, "try 0", reads))
        if self.policy.add_bos and isinstance(self.tokenizer, FileTokenizer) and self.tokenizer.bos_token is None:
            advice = "name the token, or set policy.add_bos=false"
            rule = "needs tokenizer.bos_token"
            found.append(Problem("policy.add_bos", True, rule, advice, ("tokenizer.bos_token",)))
        return found
