"""The model card: what the model is, how it was trained, how well it does, and how to load it. Markdown with the hub's YAML header."""

from typing import Any

import yaml

from ssa_pretrain.config import Config, Method, batches
from ssa_pretrain.planning.memory import count_parameters
from ssa_pretrain.settings.convert import config_to_dict
from ssa_pretrain.settings.quantities import compact

RECIPE: dict[
    str, tuple[str, ...]
] = {  # what decides the weights, by section; () is the whole section. Paths and layouts stay private
    "model": (),
    "attention": (),
    "data": ("sequence_length", "weights", "isolate_documents"),
    "optim": (),
    "precision": (),
    "training": ("total_tokens", "steps", "global_batch_tokens", "batch_steps", "micro_batch_size"),
}

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- ssa
- sparse-attention
---
# {title}

{what}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)  # attention_mode="{other}" for the other mode
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
```

- `attention_mode` is `{mode}` here. `block_size` and `top_k` may be set too, and only the sparse mode reads them.
- The longest rows of training had {length} tokens (`max_position_embeddings`).
- {bos}
- It is a pretrained model: it continues text, and was not tuned to follow instructions.

## Results
{results}
## Recipe
```yaml
{recipe}```
"""

MEAN = ", the running mean of the weights over the steps"
SSA = """\
A Llama of {parameters} parameters with sparse sparse attention (SSA, [arXiv 2511.20102](https://arxiv.org/abs/2511.20102)), trained with
ssa_pretrain: method `{method}`, {steps}. The weights work with full attention and with block-sparse attention, in which each token reads
{top_k} blocks of {block_size} tokens."""
NSA = """\
A Llama of {parameters} parameters with native sparse attention (NSA, [arXiv 2502.11089](https://arxiv.org/abs/2502.11089); the means of blocks in place
of a learned compression), trained with ssa_pretrain: method `{method}`, {steps}. Each token reads {top_k} blocks of {block_size} tokens, the means of
all complete blocks and the last {window} tokens; in full mode all tokens in place of the blocks."""

INDEXER = """\
A Llama of {parameters} parameters with block-sparse attention and a trained scorer of blocks (as in [arXiv 2606.13392](https://arxiv.org/abs/2606.13392)),
trained with ssa_pretrain: method `{method}`, {steps}. Each token reads {top_k} blocks of {block_size} tokens, which the scorer chooses; in full mode it
reads all tokens, as in the first steps of training."""
DESCRIPTIONS = {Method.nsa: NSA, Method.indexer: INDEXER}  # of the other methods SSA

NO_RESULTS = "No evaluation of this checkpoint was found beside it.\n"


def model_card(
    config: Config,
    step: int,
    vocab_size: int,
    exported: dict[str, Any],
    evaluation: dict[str, Any] | None,
    *,
    ema: bool = False,
) -> str:
    """Returns the text of README.md.

    Args:
        config: the run.
        step: optimizer steps of the checkpoint.
        vocab_size: rows of the embedding, with padding.
        exported: the content of config.json.
        evaluation: the run's evaluation.json; None if there is none of this step.
        ema: whether the weights are the running mean of the run's.
    """
    total, _ = count_parameters(config, vocab_size)
    mode = exported["attention_mode"]
    with_bos = exported["bos_token_id"] is not None
    attention = config.attention
    what = DESCRIPTIONS.get(attention.method, SSA).format(
        parameters=compact(total),
        method=attention.method.value,
        steps=f"{step:,} steps, {compact(batches(config.training).tokens_before(step))} tokens{MEAN * ema}"
        if step
        else "imported, not trained here",
        top_k=attention.top_k,
        block_size=attention.block_size,
        window=attention.window,
    )
    return CARD.format(
        title=config.name,
        what=what,
        mode=mode,
        other="sparse" if mode == "full" else "full",
        length=f"{config.data.sequence_length:,}",
        bos="The tokenizer puts BOS before each text."
        if with_bos
        else "The tokenizer adds no BOS: the model was trained without it.",
        results=_table(evaluation) if evaluation else NO_RESULTS,
        recipe=yaml.safe_dump(recipe(config), sort_keys=False, allow_unicode=True),
    )


def recipe(config: Config) -> dict[str, Any]:
    """Returns the settings that decide a run's weights, as plain values."""
    tree = config_to_dict(config)
    kept = {name: {key: tree[name][key] for key in keys or tree[name]} for name, keys in RECIPE.items()}
    return {"seed": tree["seed"], **kept}


def _table(evaluation: dict[str, Any]) -> str:
    """Returns the table of an evaluation's modes."""
    columns = {
        "cross_entropy": ("cross entropy (nats per token)", ".4f"),
        "word_perplexity": ("perplexity per word", ".2f"),
        "bits_per_byte": ("bits per byte", ".4f"),
    }
    kept = {
        key: shown for key, shown in columns.items() if all(key in values for values in evaluation["modes"].values())
    }
    lines = [f"{evaluation['rows']} held-out rows.\n", _row(["attention", *(title for title, _ in kept.values())])]
    lines.append("|---" * (len(kept) + 1) + "|")
    for mode, values in evaluation["modes"].items():
        numbers = [format(values[key], form) if values[key] is not None else "–" for key, (_, form) in kept.items()]
        lines.append(_row([mode, *numbers]))
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
