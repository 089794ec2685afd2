"""The parts that rendered shell scripts share: the command of a node, variables, and how a run ends under a scheduler.

Text for the shell is built from words that are quoted already, so that a variable of the scheduler can stand where a literal would.
"""

import shlex
import textwrap
from collections.abc import Mapping, Sequence

from ssa_pretrain.errors import ExitCode
from ssa_pretrain.launch.jobs import TRAIN
from ssa_pretrain.launch.render.spec import LaunchSpec, stages_words

# Ends that would come again: a scheduler does not start the run again after them.
FINAL = (ExitCode.CONFIGURATION, ExitCode.DATA, ExitCode.CHECKPOINT, ExitCode.DIVERGED)
WIDTH = 110


def node_words(spec: LaunchSpec, *, endpoint: str = "", rdzv_id: str = "", folder: str = "") -> list[str]:
    """Returns the quoted words of launchers/torchrun.sh, or of stages.sh, which has the same flags, on every node.

    Args:
        spec: the spec.
        endpoint: where the nodes meet, quoted for the shell; used if there are several.
        rdzv_id: distinguishes this start of the job from others, quoted for the shell; empty: the spec's name.
        folder: the folder of the launchers, quoted for the shell; empty: that in the spec's directory.
    """
    launcher = "stages.sh" if spec.recipe else "torchrun.sh"
    words = [f"{folder}/{launcher}" if folder else shlex.quote(f"{spec.directory}/launchers/{launcher}")]
    if spec.nodes > 1:
        words += [f"--nnodes {spec.nodes}", f"--nproc-per-node {spec.gpus_per_node}"]
        words += [f"--rdzv-endpoint {endpoint}", f"--rdzv-id {rdzv_id or shlex.quote(spec.name)}"]
    else:
        words += [f"--nproc-per-node {spec.gpus_per_node}"]
    return words + entry_words(spec)


def entry_words(spec: LaunchSpec) -> list[str]:
    """Returns the quoted words of a launcher that name the interpreter, the entry point and its settings."""
    words = [f"--python {shlex.quote(spec.python)}"]
    if spec.module != TRAIN:
        words.append(f"--module {shlex.quote(spec.module)}")
    if spec.recipe:
        words += map(shlex.quote, stages_words(spec))
    return words + [shlex.quote(setting) for setting in spec.settings]


def wrapped(words: Sequence[str], indent: str = "") -> str:
    """Returns a command over several lines."""
    lines, line = [], indent
    for word in words:
        if line.strip() and len(line) + len(word) > WIDTH:
            lines.append(line.rstrip())
            line = f"{indent}    "
        line += f"{word} "
    return " \\\n".join([*lines, line.rstrip()])


def exports(variables: Mapping[str, str]) -> str:
    """Returns the lines that export variables."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def heading(text: str, rendered: str) -> str:
    """Returns the comment at the head of a rendered file: how it was rendered, and what it is."""
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, WIDTH, break_on_hyphens=False) or [""]]
    return "".join(f"# {line}".rstrip() + "\n" for line in [f"Rendered by: {rendered}", *lines])


def supervised(
    spec: LaunchSpec, command: Sequence[str], *, stop_signal: str = "", stop: str = 'kill -TERM "$job" 2>/dev/null'
) -> str:
    """Returns the lines that run a command in the background, pass signals on to it and leave its exit code in `code`.

    After them, `asks_for_restart` returns whether the run is to be started again.

    Args:
        spec: the spec.
        command: its quoted words.
        stop_signal: the signal by which the scheduler asks for a stop and a restart; any other SIGTERM is only passed on.
        stop: the command that asks the run to stop and save.
    """
    handlers = {"TERM": "pass_on"} | ({stop_signal: "stopping=1; pass_on"} if stop_signal else {})
    traps = "\n".join(f"trap '{action}' {name}" for name, action in handlers.items())
    final = " | ".join(str(int(code)) for code in (ExitCode.DONE, *FINAL))
    return f"""\
stopping='' signalled='' job=''
pass_on() {{
    signalled=1
    {stop}
}}
{traps}
# Not after an end that would come again (docs/launch.md has the codes), nor after a failure in the first {spec.restart_after_minutes} minutes.
asks_for_restart() {{
    case $code in
        {final}) return 1 ;;
        {int(ExitCode.STOPPED)}) [[ -n $stopping ]] ;;
        *) [[ -n $stopping ]] || ((SECONDS >= {60 * spec.restart_after_minutes})) ;;
    esac
}}

{wrapped(command)} &
job=$!
[[ -z $signalled ]] || pass_on
wait "$job"
code=$?
while [[ -n $signalled ]]; do # the signal ended wait, not the run, which writes a checkpoint
    signalled=
    wait "$job"
    code=$?
done
"""
