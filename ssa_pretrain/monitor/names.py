"""The names of a run's metrics, in one place: what each key of metrics.jsonl means, its unit, and the group in which a dashboard shows it.

Trackers name a metric by its series and its key: `train/<key>`, `heldout/<mode>/<key>`, `task/<name>/<mode>/<key>`; a list by layer is a name per layer,
`train/captured_mass/layer_00`; a mapping by source is a name per source, `train/cross_entropy/source_web`. `tracking_rows.flatten` makes these names of a record. Each series has an x axis of its own, in tokens (AXES). The W&B
workspace, TensorBoard's layout, W&B's summaries (the best value rather than the last) and the charts of a report are built from METRICS. A test
compares it with the records of a real run and with docs/metrics.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass

TRAIN, HELDOUT, TASK = "train", "heldout", "task"
MODES = ("full", "sparse")
AXES = {TRAIN: "tokens", HELDOUT: "heldout_tokens", TASK: "task_tokens"}  # the x axis of each kind of series
GROUPS = {
    "loss": "Loss and perplexity",
    "attention": "Attention: alignment and captured mass",
    "indexer": "Trained scorer of blocks",
    "optimizer": "Optimizer",
    "data": "Data by source",
    "speed": "Speed",
    "health": "Health: skipped steps and spikes",
    "tasks": "Tasks",
}
MASS_MAP = "captured_mass_map"  # the picture of captured mass by layer, beside the metrics of held-out text


@dataclass(frozen=True, slots=True)
class Metric:
    """A key of the records.

    Attributes:
        key: in metrics.jsonl.
        group: one of GROUPS.
        unit: of its values; empty for a share or a ratio, "text" for words.
        title: for people.
        kinds: the kinds of records that have it.
        log: whether a chart's y axis is logarithmic.
        best: "min" or "max" if a run's best value is that one; empty: its last value counts.
        by_layer: whether it is a list with a value per layer.
        by_source: whether it is a mapping with a value per source.
    """

    key: str
    group: str
    unit: str
    title: str
    kinds: tuple[str, ...] = (TRAIN,)
    log: bool = False
    best: str = ""
    by_layer: bool = False
    by_source: bool = False

    @property
    def is_number(self) -> bool:
        """Whether a chart can show it."""
        return self.unit != "text"

    @property
    def stem(self) -> str:
        """The key in a tracker's names."""
        return stem_of(self.key)

    @property
    def pattern(self) -> str:
        """What follows the name of a list by layer or a mapping by source in a tracker, as a regular expression; empty for a single value."""
        return "/layer_[0-9]+" if self.by_layer else "/source_.+" if self.by_source else ""


ALL = (TRAIN, HELDOUT, TASK)
METRICS = (
    Metric("loss", "loss", "nats per token", "Training loss"),
    Metric("cross_entropy", "loss", "nats per token", "Cross entropy", ALL, best="min"),
    Metric("z_loss", "loss", "nats per token", "z-loss", log=True),
    Metric("perplexity", "loss", "", "Perplexity", (HELDOUT, TASK), log=True, best="min"),
    Metric("rows", "loss", "rows", "Held-out rows", (HELDOUT, TASK)),
    Metric("alignment_loss", "attention", "", "Alignment loss", (TRAIN, HELDOUT), log=True),
    Metric("alignment_loss_by_layer", "attention", "", "Alignment loss by layer", (TRAIN,), log=True, by_layer=True),
    Metric("captured_mass", "attention", "", "Captured attention mass", ALL, best="max"),
    Metric("captured_mass_by_layer", "attention", "", "Captured mass by layer", (TRAIN, HELDOUT), by_layer=True),
    Metric("stream", "attention", "text", "Main stream"),
    Metric("attention_entropy", "attention", "nats", "Entropy of full attention", (HELDOUT,)),
    Metric("attention_entropy_by_layer", "attention", "nats", "Attention entropy by layer", (HELDOUT,), by_layer=True),
    Metric("index_loss", "indexer", "nats", "Index loss", log=True),
    Metric("index_loss_by_layer", "indexer", "nats", "Index loss by layer", log=True, by_layer=True),
    Metric("full_share", "attention", "", "Share of full microbatches"),
    Metric("grad_norm", "optimizer", "", "Gradient norm", log=True),
    Metric("learning_rate", "optimizer", "", "Learning rate"),
    Metric("batch_tokens", "optimizer", "tokens", "Tokens per step, if they change"),
    Metric("cross_entropy_by_source", "data", "nats per token", "Cross entropy by source", by_source=True),
    Metric("labels_by_source", "data", "labels", "Labels of the step by source", by_source=True),
    Metric("tokens_by_source", "data", "tokens", "Tokens read by source", by_source=True),
    Metric("epochs_by_source", "data", "", "Epochs by source", by_source=True),
    Metric("padding_share", "data", "", "Share of padding"),
    Metric("tokens_per_second", "speed", "tokens/s", "Tokens per second"),
    Metric("tflops_per_second", "speed", "TFLOP/s", "Model TFLOP/s of all devices"),
    Metric("mfu", "speed", "", "MFU", best="max"),
    Metric("seconds", "speed", "s", "Seconds per step"),
    Metric("peak_memory_gib", "speed", "GiB", "Peak memory of rank 0's GPU"),
    Metric("eta_seconds", "speed", "s", "Time left"),
    Metric("skipped", "health", "", "Skipped steps"),
    Metric("skip_reason", "health", "text", "Why a step was skipped"),
    Metric("spike", "health", "text", "Main stream of a spike"),
    Metric("spike_cross_entropy", "health", "nats per token", "Cross entropy of a spike"),
    Metric("spike_deviations", "health", "", "Deviations of a spike above the median"),
    Metric("acc", "tasks", "", "Accuracy, by log-likelihood", (TASK,), best="max"),
    Metric("acc_norm", "tasks", "", "Accuracy, by log-likelihood per character", (TASK,), best="max"),
    Metric("acc_stderr", "tasks", "", "Standard error of acc", (TASK,)),
    Metric("acc_norm_stderr", "tasks", "", "Standard error of acc_norm", (TASK,)),
    Metric("num_questions", "tasks", "questions", "Questions", (TASK,)),
    Metric("accuracy", "tasks", "", "Needles found", (TASK,), best="max"),
    Metric("word_perplexity", "tasks", "", "Perplexity per word", (TASK,), log=True, best="min"),
    Metric("byte_perplexity", "tasks", "", "Perplexity per byte", (TASK,), best="min"),
    Metric("bits_per_byte", "tasks", "bits", "Bits per byte", (TASK,), best="min"),
    Metric("num_words", "tasks", "words", "Words", (TASK,)),
    Metric("num_bytes", "tasks", "bytes", "Bytes", (TASK,)),
)
BY_KEY = {metric.key: metric for metric in METRICS}
POSITION = ("kind", "step", "tokens", "split", "task", "mode")  # keys that say what a record is about


def metric_of(key: str) -> Metric | None:
    """Returns the metric of a record's key, None for one that says what the record is about. A needle's accuracy by length counts as `accuracy`.

    Raises:
        KeyError: METRICS does not have it.
    """
    if key in POSITION:
        return None
    return BY_KEY["accuracy" if key.startswith("accuracy_") else key]


def series_of(kind: str) -> list[str]:
    """Returns the series of a kind that are known before a run: one for training, one per mode of held-out text, none for tasks."""
    return {TRAIN: [TRAIN], HELDOUT: [f"{HELDOUT}/{mode}" for mode in MODES]}.get(kind, [])


def names(metric: Metric, kind: str) -> list[str]:
    """Returns a tracker's names of a metric in records of a kind; those of lists by layer without the layer."""
    return [f"{series}/{metric.stem}" for series in series_of(kind)]


def stem_of(key: str) -> str:
    """Returns a record's key as trackers name it."""
    return key.removesuffix("_by_layer").removesuffix("_by_source")


def source_name(name: str, source: str) -> str:
    """Returns a tracker's name of one source's value."""
    return f"{name}/source_{source}"


def layer_name(name: str, layer: int) -> str:
    """Returns a tracker's name of one layer's value."""
    return f"{name}/layer_{layer:02d}"


def summaries() -> Iterator[tuple[str, str, str]]:
    """Yields name, x axis and "min" or "max" of the metrics whose best value is a run's result."""
    for metric in METRICS:
        for kind in metric.kinds:
            if metric.best and not metric.pattern:
                yield from ((name, AXES[kind], metric.best) for name in names(metric, kind))
