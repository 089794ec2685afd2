"""The settings of data_prep as typed dataclasses; conf/ holds the YAML that fills them.

Every dataclass returns its own problems, so that one run reports all of them together. Source, tokenizer and executor are unions: the Hydra
group picks the dataclass by its `kind`. No file is opened here: what must be looked up on the disk is checked where it is read.
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
    """What becomes of a special token's name when it occurs literally in a document."""

    text = "text"  # encoded like any other characters: nobody's text can end a document
    control = "control"  # becomes the special id


class Stage(Enum):
    """What a run does. Each of the first six needs what those before it left, and does nothing where that is done."""

    plan = "plan"  # prints what will be made and what it costs
    fetch = "fetch"  # brings the text to this machine
    tokenize = "tokenize"  # text to shards, each with a record
    merge = "merge"  # shards to a bounded number of files, and the manifest
    validate = "validate"  # reads every byte of the dataset in `out` and reports what is wrong with it
    stats = "stats"  # statistics and a page about the dataset in `out`
    prepare = "prepare"  # plan to merge: text to a finished dataset
    all = "all"  # the six in their order


class BackendChoice(Enum):
    """Which program encodes; the bytes written do not depend on it."""

    auto = "auto"  # the first of gigatoken, tiktoken that is installed and gives hf's ids on a sample of the corpus, else hf
    gigatoken = "gigatoken"  # the same, but an error if it cannot be used
    tiktoken = "tiktoken"  # likewise
    hf = "hf"  # Hugging Face's tokenizers


class Verify(Enum):
    """How much of a finished dataset is compared with its manifest before it is reused."""

    quick = "quick"  # existence, sizes, headers
    full = "full"  # and the sha256 of every file


@dataclass(kw_only=True, slots=True)
class BpeTokenizer:
    """A byte-level BPE trained on the train split of the corpus itself."""

    kind: str = "bpe"  # the kind of tokenizer, set by tokenizer=
    vocab_size: int = 8192  # entries, special tokens included
    sample_mb: float = 12.0  # most MB of train documents to learn from, chosen by document hash

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        found = between("tokenizer", self, 512, 1_000_000, "vocab_size")
        return found + above_zero("tokenizer", self, "sample_mb")


@dataclass(kw_only=True, slots=True)
class Llama3Tokenizer:
    """Llama 3's tokenizer, converted from the tokenizer.model that Meta's llama-models package ships."""

    kind: str = "llama3"  # the kind of tokenizer, set by tokenizer=
    path: str | None = None  # a tokenizer.model elsewhere; null looks into the installed package llama-models

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
    """What is added to a document's ids, and what is never taken from its text."""

    add_bos: bool = False  # begin each document with the BOS id
    append_eos: bool = True  # end each document with the EOS id; training finds document boundaries by it
    specials: Specials = Specials.text  # what a special token's name in the text becomes

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        if not self.append_eos:
            rule = "leaves no mark between documents, which training needs"
            return [Problem("policy.append_eos", self.append_eos, rule, "try true")]
        return []


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    """Which documents are held out: those whose hash falls below a threshold, so equal texts share a side."""

    heldout_fraction: float = 0.02  # share of the documents; 1 makes a dataset for measuring only
    seed: int = 0  # another seed holds out other documents

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        return between("split", self, 0.0, 1.0, "heldout_fraction")


@dataclass(kw_only=True, slots=True)
class Config:
    """Everything that one run of data_prep is told."""

    stage: Stage = Stage.all
    out: str = MISSING  # folder of the dataset
    cache: str = "outputs/cache/data_prep"  # folder of downloads and converted tokenizers, shared by datasets
    source: AnySource = MISSING  # where the text comes from
    tokenizer: BpeTokenizer | Llama3Tokenizer | FileTokenizer = MISSING  # what makes ids of it
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    executor: LocalExecutor | SlurmExecutor | RayExecutor = MISSING  # where the work runs
    stats: StatsConfig = field(default_factory=StatsConfig)
    shard_mb: float = (
        0.0  # MB of input of one shard, the unit of work and of resuming; 0 chooses by the size of the corpus
    )
    backend: BackendChoice = BackendChoice.auto  # which program encodes; the bytes written do not depend on it
    workers: int = 0  # processes of executor=local; 0 takes one a core; the bytes written do not depend on it
    overwrite: bool = False  # replace a finished dataset in `out` that was made with other settings or inputs
    verify: Verify = Verify.quick  # how a finished dataset is checked before it is reused
    retokenize: int = 200  # documents that stage=validate encodes again where the text is still there; 0 for none

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
        """The problems of rules that read several sections."""
        found, heldout = [], self.split.heldout_fraction
        if self.packing.kind is Packing.official_row and self.policy.add_bos:
            rule = "contradicts packing=official_row, which writes no BOS, as the published code"
            found.append(Problem("policy.add_bos", True, rule, "try false", ("packing.kind",)))
        if heldout == 1 and self.tokenizer.kind == "bpe":
            advice = "name the one of the training data with tokenizer=file tokenizer.path=…/tokenizer.json, or tokenizer=llama3"
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
