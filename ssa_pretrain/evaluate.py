"""Entry point: held-out metrics in both modes and sampled continuations of a run's newest checkpoint.

    python -m ssa_pretrain.evaluate outputs/quickstart evaluation.rows=8
    python -m ssa_pretrain.evaluate outputs/quickstart/checkpoints/step_00000100
    python -m ssa_pretrain.evaluate experiment=quickstart

Takes a run's folder, whose `config.yaml` is the configuration then, or one of its checkpoints, or the run's own command line. A checkpoint loads
on any layout, so one process can judge what many trained, and the metrics depend neither on the layout nor on training.micro_batch_size. Writes
`evaluation.json` and `samples.json` into the run's folder. evaluation.rows sets how much of the held-out split is read; 0 is all of it. A prompt
and its continuation together have at most as many tokens as a row.
"""

import json
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

from ssa_pretrain.config import Config
from ssa_pretrain.process import leave, quieten_libraries, rank_process
from ssa_pretrain.signals import INTERRUPTED

PROMPTS = 6
NEW_TOKENS = 48
TEMPERATURE = 0.8
TOKENS_MULTIPLE = 16  # of a packed sequence on a rank: FP8 products need 8, context parallelism two chunks


def main() -> None:
    """Reads the command line, evaluates, samples, writes."""
    with rank_process("interrupted; the same command evaluates again", code=INTERRUPTED, signals=[signal.SIGINT]):
        from ssa_pretrain.cli import read_config
        from ssa_pretrain.saved_run import NoCheckpointError, named_checkpoint

        try:
            checkpoint = named_checkpoint(sys.argv[1:])
        except NoCheckpointError as error:
            return leave(error, 5)
        config = read_config("evaluate")
        quieten_libraries()
        from ssa_pretrain.checkpoint import CheckpointError
        from ssa_pretrain.data.errors import DataError
        from ssa_pretrain.settings.problems import ConfigError
        from ssa_pretrain.weights import WeightsError

        try:
            evaluate_run(config, checkpoint)
        except (CheckpointError, WeightsError) as error:
            leave(error, 5)
        except DataError as error:
            leave(error, 4)
        except ConfigError as error:
            leave(error, error.exit_code)


def evaluate_run(config: Config, checkpoint: Path | None = None) -> None:
    """Evaluate and sample a checkpoint of a run, by default its newest; every rank calls it."""
    from ssa_pretrain.checkpoint import CheckpointError, require_same_model
    from ssa_pretrain.parallel.state import joined
    from ssa_pretrain.trainer import MODES, build_run, facts, judge, newest_checkpoint, say, warn_of_another_tokenizer

    # User buffers have the shape of a microbatch, and prompts have another.
    config = replace(config, engine=replace(config.engine, overlap_tp=False))
    with joined(config.parallel, seed=config.seed) as placement:
        # The plan wants a batch of whole microbatches, and what the run trained with need not be one on this layout.
        rows = placement.dp * config.training.micro_batch_size
        batch = replace(config.training, global_batch_tokens=rows * config.data.sequence_length)
        run = build_run(replace(config, training=batch), placement, trains=False)
        found = newest_checkpoint(run, checkpoint)
        if found is None:
            raise CheckpointError(f"{run.folder} holds no checkpoint; give the folder of a run that has saved one")
        require_same_model(found, facts(run))
        warn_of_another_tokenizer(run, found)
        run.engine.load_weights(found.folder)
        metrics = {}
        for mode in MODES:
            metrics[mode] = asdict(judge(run, mode))
            say(run, f"held-out, {mode:<6}: cross entropy {metrics[mode]['cross_entropy']:.4f}")
        if placement.is_first:
            tokens = found.step * found.facts["training.global_batch_tokens"]
            read = {"step": found.step, "tokens": tokens, "split": "heldout", "rows": run.held_out.num_rows}
            _write(run.folder / "evaluation.json", read | {"modes": metrics})
        samples = sample(run, MODES)
        if placement.is_first:
            _write(run.folder / "samples.json", samples)


def sample(run, modes: tuple[str, ...]) -> list[dict]:
    """Return a continuation of each prompt in each mode, drawn with one seed; every rank computes the same.

    A text ends where it is as long as a row; of a longer prompt its end is shown and continued by nothing.
    """
    import torch
    from tokenizers import Tokenizer
    from tqdm import tqdm

    tokenizer = Tokenizer.from_file(str(run.manifest.root / run.manifest.tokenizer.file))
    length = run.config.data.sequence_length  # as far as positions go
    prompts = [prompt[-length:] for prompt in held_out_prompts(run)]
    shown = run.placement.is_first and sys.stderr.isatty()
    found = []
    for mode in modes:
        generator = torch.Generator().manual_seed(run.config.seed)
        texts = [list(prompt) for prompt in prompts]
        most = min(NEW_TOKENS, length - min(len(text) for text in texts))
        for _ in tqdm(range(most), desc=f"sampling, {mode}", disable=not shown, leave=False):
            packed = packed_prompts(texts, TOKENS_MULTIPLE * run.plan.cp * run.plan.tp, length)
            logits = run.engine.last_logits(packed, mode=mode).cpu()
            logits = logits[: len(texts), : run.plan.vocab_size]
            chosen = torch.multinomial((logits / TEMPERATURE).softmax(-1), 1, generator=generator)
            for text, token in zip(texts, chosen.flatten().tolist(), strict=True):
                if len(text) < length:
                    text.append(token)
        for prompt, text in zip(prompts, texts, strict=True):
            new = text[len(prompt) :]
            if run.manifest.tokenizer.eos_id in new:
                new = new[: new.index(run.manifest.tokenizer.eos_id)]
            found.append({"prompt": tokenizer.decode(prompt), "mode": mode, "text": tokenizer.decode(new)})
    return found


def held_out_prompts(run) -> list[list[int]]:
    """Return the beginnings of held-out rows, spread over the split: longer than the chosen blocks cover, so that the modes see different keys."""
    import numpy as np

    covered, length = run.config.attention.top_k * run.config.attention.block_size, run.config.data.sequence_length
    room = max(1, min(2 * covered, length - min(NEW_TOKENS, length // 2)))
    prompts = []
    for i in range(run.held_out.num_rows):
        row = run.held_out.row(i)
        ends = np.append(np.flatnonzero(row.starts[1:]) + 1, len(row.tokens))
        if ends[0] > room:
            prompts.append(row.tokens[:room].tolist())
    step = max(1, len(prompts) // PROMPTS)
    if not prompts:
        row = run.held_out.row(0)
        prompts = [row.tokens[: len(row.tokens) - row.padding][:room].tolist()]
    return prompts[::step][:PROMPTS]


def packed_prompts(texts: list[list[int]], multiple: int, length: int):
    """Return the texts as the documents of one microbatch without labels, further ones of at most `length` filling it up to a multiple of tokens."""
    import torch

    from ssa_pretrain.data.batches import Batch

    rest = -sum(len(text) for text in texts) % multiple
    texts = [*texts, *([0] * min(length, rest - begin) for begin in range(0, rest, length))]
    tokens = torch.tensor([t for text in texts for t in text])
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    ends = torch.tensor([0] + [len(text) for text in texts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    empty = torch.zeros_like(tokens).unsqueeze(0)
    return Batch(0, tokens.unsqueeze(0), empty, empty.float(), positions, ends)


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
