"""Which shards make up a token budget: for each part of a mix, the shortest beginning of its shuffled shards that is enough.

A part's shards are ordered by a keyed hash, so that a budget takes a fair sample and a larger budget adds to a smaller one. How many
are enough is known only once they are tokenized: `choose` guesses for those that are not, and is asked again with the new counts
until it guesses no more. The last answer depends on exact counts alone, never on how the guesses went.
"""

from data_prep.errors import ConfigurationError
from data_prep.files import digest
from data_prep.run_config import MixConfig
from data_prep.shards import Job

FIRST_GUESS = 0.25  # tokens a byte of input, until a shard of the part is known


def shares(mix: MixConfig, jobs: list[Job]) -> dict[str, float]:
    """Returns the share of each part in the tokens, summing to 1; empty where all there is is taken as it is.

    Raises:
        ConfigurationError: a part of the mix has no text, or text has no part in the mix.
    """
    names = list(dict.fromkeys(job.shard.name for job in jobs))
    if not mix.weights:
        if not mix.target_tokens:
            return {}
        sizes = {name: sum(job.shard.size for job in jobs if job.shard.name == name) for name in names}
        return {name: size / sum(sizes.values()) for name, size in sizes.items()}
    if unknown := [name for name in names if name not in mix.weights]:
        raise ConfigurationError(
            f"mix.weights has no weight for {', '.join(unknown)}; add one, or leave that part out of the source"
        )
    absent = [name for name in mix.weights if name not in names]
    if absent and mix.missing == "refuse":
        raise ConfigurationError(
            f"mix.weights names {', '.join(absent)}, which the source has no text for (it has {', '.join(names)}); "
            "add it to the source, or say mix.missing=drop"
        )
    total = sum(mix.weights[name] for name in names)
    return {name: mix.weights[name] / total for name in names}


def choose(mix: MixConfig, jobs: list[Job], tokens: dict[str, int]) -> list[Job]:
    """Returns the shards that the budget needs, as far as can be told, in the order of `jobs`.

    Args:
        mix: weights and budget.
        jobs: every shard of the corpus.
        tokens: train tokens of the shards that are made, by stem.
    """
    if not mix.target_tokens:
        return jobs
    chosen: set[str] = set()
    for name, share in shares(mix, jobs).items():
        own = [job for job in jobs if job.shard.name == name]
        own.sort(key=lambda job: digest([mix.seed, job.shard.stem]))
        known = [job for job in own if job.shard.stem in tokens]
        size = sum(job.shard.size for job in known)
        rate = sum(tokens[job.shard.stem] for job in known) / size if size else FIRST_GUESS
        total = 0.0
        for job in own:
            if total >= share * mix.target_tokens:
                break
            chosen.add(job.shard.stem)
            total += tokens.get(job.shard.stem, rate * job.shard.size)
    return [job for job in jobs if job.shard.stem in chosen]
