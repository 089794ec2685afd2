"""Which shards make up a token budget: for each part of a mix, the shortest prefix of its shuffled shards that is enough.

The shards of a part are ordered by a keyed hash. So a budget takes a fair sample, and a larger budget adds to a smaller
one. How many shards are enough is known only after they are tokenized. `choose` estimates the tokens of the other shards,
and is called again with the new counts until no estimate is left. The final choice depends only on exact
counts, not on the estimates.
"""

from data_prep.errors import ConfigurationError
from data_prep.files import digest
from data_prep.run_config import MixConfig
from data_prep.shards.shard import Job

FIRST_ESTIMATE = 0.25  # tokens per byte of input, until a shard of the part is tokenized


def shares(mix: MixConfig, jobs: list[Job]) -> dict[str, float]:
    """Returns each part's share of the tokens, summing to 1; empty if there are neither weights nor a budget.

    Raises:
        ConfigurationError: a part of the mix has no text, or text belongs to no part of the mix.
    """
    parts = list(dict.fromkeys(job.shard.part for job in jobs))
    if not mix.weights:
        if not mix.target_tokens:
            return {}
        sizes = {part: sum(job.shard.size for job in jobs if job.shard.part == part) for part in parts}
        return {part: size / sum(sizes.values()) for part, size in sizes.items()}
    if unknown := [part for part in parts if part not in mix.weights]:
        raise ConfigurationError(
            f"mix.weights has no weight for {', '.join(unknown)}; add one, or leave that part out of the source"
        )
    absent = [part for part in mix.weights if part not in parts]
    if absent and mix.missing == "refuse":
        raise ConfigurationError(
            f"mix.weights names {', '.join(absent)}, which the source has no text for (it has {', '.join(parts)}); "
            "add it to the source, or set mix.missing=drop"
        )
    total = sum(mix.weights[part] for part in parts)
    return {part: mix.weights[part] / total for part in parts}


def choose(mix: MixConfig, jobs: list[Job], tokens: dict[str, int]) -> list[Job]:
    """Returns the shards that the budget needs, as far as is known yet, in the order of `jobs`.

    Args:
        mix: weights and budget.
        jobs: every shard of the corpus.
        tokens: train tokens of the finished shards, by stem.
    """
    if not mix.target_tokens:
        return jobs
    chosen: set[str] = set()
    for part, share in shares(mix, jobs).items():
        own = [job for job in jobs if job.shard.part == part]
        own.sort(key=lambda job: digest([mix.seed, job.shard.stem]))
        known = [job for job in own if job.shard.stem in tokens]
        size = sum(job.shard.size for job in known)
        tokens_per_byte = sum(tokens[job.shard.stem] for job in known) / size if size else FIRST_ESTIMATE
        total = 0.0
        for job in own:
            if total >= share * mix.target_tokens:
                break
            chosen.add(job.shard.stem)
            total += tokens.get(job.shard.stem, tokens_per_byte * job.shard.size)
    return [job for job in jobs if job.shard.stem in chosen]
