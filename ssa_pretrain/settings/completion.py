"""Completion of a module's command line in bash and zsh: groups, their options, keys, their values, flags.

    eval "$(python -m ssa_pretrain.train -sc install=bash)"

One shell function answers for all modules of this project, since bash has one per program, which is python. It asks the module that is being
typed with `-sc query=bash` and the line in COMP_LINE. Hydra's own completion knows programs by their file only. If nothing fits, the shell
completes files. Neither torch nor Hydra is used.
"""

from collections.abc import Sequence
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

from ssa_pretrain.settings.convert import known_keys
from ssa_pretrain.settings.kinds import offers
from ssa_pretrain.settings.problems import ConfigError, Problem

FLAGS = ("--help", "--version", "--explain", "--dry-run", "--cfg", "--resolve", "--package", "--info")
FLAGS += ("--config-path", "--config-name", "--config-dir", "--shell-completion")
SCRIPT = r"""_ssa_pretrain_complete() {
    local line=${COMP_LINE:0:$COMP_POINT} candidate typed prefix= program module
    COMPREPLY=()
    [[ $line =~ [[:space:]]-m[[:space:]]+(data_prep|ssa_pretrain\.(train|evaluate|plan))[[:space:]] ]] || return 0
    module=${line#*[[:space:]]-m[[:space:]]}
    read -r module _ <<<"$module"
    typed=${line##*[[:space:]]}
    [[ $COMP_WORDBREAKS == *=* && $typed == *=* ]] && prefix=${typed%=*}=
    program=${line%%[[:space:]]*}
    [[ $program == *python* ]] || program=python
    while IFS= read -r candidate; do
        [[ -n ${ZSH_VERSION-} ]] && candidate=${candidate% }
        COMPREPLY+=("${candidate#"$prefix"}")
    done < <(COMP_LINE=$line "$program" -m "$module" -sc query=bash 2>/dev/null)
}
complete -o nospace -o default -o bashdefault -F _ssa_pretrain_complete python python3 torchrun
"""


def completion(words: Sequence[str], line: str, program: str, root: Any, conf: Path) -> str:
    """Returns the output of `-sc`.

    Args:
        words: the arguments beside the flag: one of install=bash, uninstall=bash, query=bash, or the same for zsh.
        line: the command line up to the cursor, for a query.
        program: the module, as in `python -m PROGRAM`.
        root: the dataclass of the whole configuration.
        conf: the folder of the groups.

    Raises:
        ConfigError: the words are something else.
    """
    action, _, shell = (words[0] if len(words) == 1 else "").partition("=")
    if shell not in ("bash", "zsh") or action not in ("install", "uninstall", "query"):
        advice = f'try eval "$(python -m {program} -sc install=bash)"'
        raise ConfigError(
            [Problem("--shell-completion", " ".join(words), "must be install=bash or install=zsh", advice)]
        )
    if action == "install":
        load = "autoload -Uz compinit bashcompinit\ncompinit\nbashcompinit\n" if shell == "zsh" else ""
        return load + SCRIPT
    if action == "uninstall":
        return "complete -r python python3 torchrun\n"
    return "".join(f"{candidate}\n" for candidate in candidates(line, root, conf))


def candidates(line: str, root: Any, conf: Path) -> list[str]:
    """Returns the completions of the last word of a line. A complete word ends with a space, a key with its =."""
    words = line.split()
    typed = "" if not words or line[-1:].isspace() else words.pop()
    folders = [conf, *(Path(b) for a, b in pairwise(words) if a in ("-cd", "--config-dir"))]
    keys, groups = known_keys(root), _groups(folders, root)
    key, equals, _ = typed.partition("=")
    sign = key[: len(key) - len(key.lstrip("+"))]
    if words and words[-1] == "--explain":
        sections = {name.rpartition(".")[0] for name in keys} - {""}
        found = [f"{name} " for name in sorted({*keys, *groups, *sections})]
    elif typed.startswith("-"):
        found = [f"{flag} " for flag in FLAGS]
    elif equals:
        bare = key.removeprefix(sign)
        kind = keys.get(bare)
        values = groups.get(bare, [])
        if isinstance(kind, type) and issubclass(kind, Enum):
            values = [str(member.value) for member in kind]
        elif kind is bool:
            values = ["true", "false"]
        found = [f"{key}={value} " for value in values]
    else:
        found = [f"{sign}{name}=" for name in sorted({*keys, *groups})]
    return [word for word in found if word.startswith(typed)]


def _groups(folders: Sequence[Path], root: Any) -> dict[str, list[str]]:
    """Returns the options of each group, by group, over all folders."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for path in folder.glob("*/*.yaml"):
            if not offers(root, path.parent.name):
                continue
            found.setdefault(path.parent.name, set()).add(path.stem)
    return {group: sorted(options) for group, options in found.items()}
