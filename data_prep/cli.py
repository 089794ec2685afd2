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
from data_prep.run_config import LocalExecutor, RayExecutor, SlurmExecutor
from data_prep.sources.catalog import SOURCES
from data_prep.sources.mixed import MixedSource
from data_prep.stages import run_stages

USAGE = """\
Text in, indexed binaries out.

  python -m data_prep source=quickstart tokenizer=bpe8k out=outputs/quickstart/data
  python -m data_prep source=jsonl source.paths=[texts/*.jsonl.gz] tokenizer=llama3 out=outputs/mine
  python -m data_prep stage=validate out=outputs/mine

Settings are KEY=VALUE; --cfg job shows all of them with their values, docs/data.md explains them.
"""

CONF = Path(__file__).parent / "conf"

FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)

# Dictionaries whose keys are names of the user's.
OWN_NAMES = ("mix.weights", "executor.sbatch", "source.parts")

SCHEMAS = {
    "source": {**{kind: source.settings for kind, source in SOURCES.items()}, "mixed": MixedSource},
    "tokenizer": {"bpe": settings.BpeTokenizer, "llama3": settings.Llama3Tokenizer, "file": settings.FileTokenizer},
    "executor": {"local": LocalExecutor, "slurm": SlurmExecutor, "ray": RayExecutor},
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
        run_stages(config, _say, sys.stdout.write)
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
            return compose("config", [_opened(override) for override in overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(_explain(error)) from None


def _opened(override: str) -> str:
    """Returns an override that may add keys, where the keys are the user's own names."""
    return f"++{override}" if override.startswith(tuple(name + end for name in OWN_NAMES for end in ".=")) else override


def checked(composed: DictConfig) -> settings.Config:
    """Returns the settings as dataclasses; ConfigurationError with every problem found."""
    for name in OWN_NAMES:  # which `_opened` lets in under any choice
        group, key = name.split(".")
        takers = [kind for kind, schema in SCHEMAS.get(group, {}).items() if key in schema.__dataclass_fields__]
        if takers and key in composed[group] and (kind := composed[group].kind) not in takers:
            raise ConfigurationError(
                f"{name} is a setting of {group}={takers[0]}, not of {kind}; choose that, or leave it out"
            )
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


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _help() -> str:
    groups = "\n".join(f"  {group}={'|'.join(_choices(group))}" for group in (*SCHEMAS, "mix", "packing"))
    groups += f"\n  stage={'|'.join(stage.value for stage in settings.Stage)}"
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
