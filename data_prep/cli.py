"""The command line: Hydra composes the settings, the dataclasses check them, mistakes become one message and an exit code.

Hydra's compose API is used and not its decorator: the decorator makes an output folder for each run, changes logging and ends
every mistake with code 1. Exit codes: 0 done, 3 a setting is wrong, 4 an input cannot be used, 130 interrupted.
"""

import argparse
import difflib
import errno
import re
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from data_prep import config as settings
from data_prep.errors import ConfigurationError, InputError
from data_prep.pipeline import prepare_dataset
from data_prep.sources.hub_settings import HubSource
from data_prep.validate import validate_dataset
from ssa_pretrain.data.indexed_format import Manifest

USAGE = """\
Text in, indexed binaries out.

  python -m data_prep source=quickstart tokenizer=bpe8k out=outputs/quickstart/data
  python -m data_prep source=jsonl source.paths=[texts/*.jsonl.gz] tokenizer=llama3 out=outputs/mine
  python -m data_prep stage=validate out=outputs/mine

Settings are KEY=VALUE; --cfg job shows all of them with their values, docs/data.md explains them.
"""

CONF = Path(__file__).parent / "conf"

FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)

SCHEMAS = {
    "source": {
        "quickstart": settings.QuickstartSource,
        "local_docs": settings.LocalDocsSource,
        "hub": HubSource,
        "jsonl": settings.JsonlSource,
        "parquet": settings.ParquetSource,
        "text": settings.TextSource,
    },
    "tokenizer": {"bpe": settings.BpeTokenizer, "llama3": settings.Llama3Tokenizer, "file": settings.FileTokenizer},
}


def main(arguments: list[str]) -> int:
    """Runs data_prep and returns its exit code."""
    parser = argparse.ArgumentParser(
        "python -m data_prep", description=_help(), formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cfg", choices=["job"], help="print the settings and stop")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    try:
        composed = compose_settings(options.overrides)
        if options.cfg:
            sys.stdout.write(OmegaConf.to_yaml(composed))
            return 0
        config = checked(composed)
        if config.stage is settings.Stage.validate:
            return _validate(config)
        manifest = prepare_dataset(config, _say)
    except (ConfigurationError, InputError) as error:
        _say(f"error: {error}")
        return error.exit_code
    except OSError as error:
        if error.errno not in FULL_OR_FORBIDDEN:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _say(f"error: {error.strerror}{where}; make room or choose another out=, then run the same command again")
        return InputError.exit_code
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to go on")
        return 130
    sys.stdout.write(summary(manifest) + "\n")
    return 0


def compose_settings(overrides: list[str]) -> DictConfig:
    """Returns the settings as Hydra composes them; ConfigurationError for an unknown key, group or type."""
    store = ConfigStore.instance()
    store.store(name="base_config", node=settings.Config)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=f"base_{name}", node=schema)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(_explain(error)) from None


def checked(composed: DictConfig) -> settings.Config:
    """Returns the settings as dataclasses; ConfigurationError with every problem found."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigurationError("; ".join(f"{key}= is not set and has no default; give {key}=…" for key in missing))
    try:
        config = OmegaConf.to_object(composed)
    except (MissingMandatoryValue, OmegaConfBaseException) as error:
        raise ConfigurationError(_explain(error)) from None
    if not isinstance(config, settings.Config):
        raise TypeError(f"settings became {type(config).__name__}, not Config")
    if problems := config.problems():
        raise ConfigurationError("; ".join(problems))
    return config


def summary(manifest: Manifest) -> str:
    """Returns a small table of what a dataset holds."""
    rows = [("split", "part", "documents", "tokens", "MB on disk")]
    for split, shards in manifest.splits.items():
        for name in dict.fromkeys(shard.name for shard in shards):
            part = [shard for shard in shards if shard.name == name]
            size = sum(shard.bin_bytes + shard.idx_bytes for shard in part) / 1e6
            rows.append(
                (split, name, f"{sum(s.documents for s in part):,}", f"{sum(s.tokens for s in part):,}", f"{size:.1f}")
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    entropy = manifest.unigram_entropy_nats
    lines.append(
        f"{manifest.bytes_per_token:.2f} bytes a token; unigram entropy {entropy['train']:.3f} nats (train), "
        f"{entropy['heldout']:.3f} (held out)"
    )
    lines.append(f"{manifest.root / 'manifest.json'}")
    return "\n".join(lines)


def _validate(config: settings.Config) -> int:
    manifest, found = validate_dataset(Path(config.out).expanduser())
    for problem in found:
        _say(f"damaged: {problem}")
    if found:
        _say(f"error: {manifest.root} has {len(found)} problems; run data_prep again with verify=full to repair it")
        return InputError.exit_code
    sys.stdout.write(summary(manifest) + "\nvalid: every file, id and document is as the manifest says\n")
    return 0


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _help() -> str:
    groups = "\n".join(f"  {group}={'|'.join(_choices(group))}" for group in SCHEMAS)
    return f"{USAGE}\nGroups:\n{groups}"


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _explain(error: BaseException) -> str:
    """Returns Hydra's complaint as one sentence with the nearest valid choice."""
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found[1]
        near = difflib.get_close_matches(key, _known_keys(), n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else "see --cfg job for all keys"
        return f"{key} is no setting; {remedy}"
    if found := re.search(r"Could not find '(\w+)/([^']*)'", text):
        group, value = found[1], found[2]
        near = difflib.get_close_matches(value, _choices(group), n=1)
        hint = f"; did you mean {group}={near[0]}?" if near else ""
        return f"{group}={value} must be one of {', '.join(_choices(group))}{hint}"
    # The innermost cause is the complaint itself; what surrounds it repeats the command line.
    inner = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    if "is not a ListConfig" in str(inner):
        return f"{key}= takes a list; write {key}=[…], with the brackets"
    lines = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return f"{key}: {' '.join(lines)}; see docs/data.md for what it takes" if key else " ".join(lines)


def _known_keys() -> list[str]:
    keys = []
    for group, schemas in SCHEMAS.items():
        keys += [group, *(f"{group}.{name}" for schema in schemas.values() for name in schema.__dataclass_fields__)]
    for name, field in settings.Config.__dataclass_fields__.items():
        keys.append(name)
        keys += [f"{name}.{inner}" for inner in getattr(field.type, "__dataclass_fields__", {})]
    return keys
