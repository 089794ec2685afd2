"""A W&B workspace for the runs of this project: `python -m ssa_pretrain.report.workspace --entity ENTITY --project PROJECT`.

Builds a saved view from the names that runs log (monitor/names.py), with the package wandb-workspaces (extra `trackers`): a section per group, a panel per
metric over its own axis of tokens, one panel for all layers of a metric by layer, the pictures of captured mass, and the settings that matter as columns.
Each call saves a new view. With `--out FILE` it writes the view as JSON instead and needs neither a network nor an account.

Exit codes: 0 done, 3 wrong arguments, a missing package, or W&B refused.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssa_pretrain.errors import ExitCode, UsageError
from ssa_pretrain.monitor.names import AXES, GROUPS, HELDOUT, MASS_MAP, METRICS, MODES, TASK, TRAIN, Metric, names
from ssa_pretrain.process import command
from ssa_pretrain.settings.files import write_atomically
from ssa_pretrain.settings.output import pipe_may_close

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import LinePlot
    from wandb_workspaces.workspaces import Section, Workspace

NAME = "SSA pretraining"
OPEN = ("loss", "attention")  # sections that are unfolded
NOT_DRAWN = ("rows", "num_questions", "num_words", "num_bytes", "acc_stderr", "acc_norm_stderr")  # hardly change
KINDS = {TRAIN: "training", HELDOUT: "held-out text", TASK: "tasks"}


def workspace(entity: str, project: str, name: str = NAME) -> "Workspace":
    """Returns the workspace; nothing is sent.

    Args:
        entity: W&B user or team.
        project: W&B project.
        name: of the view.

    Raises:
        UsageError: the package wandb-workspaces is not installed.
    """
    try:
        from wandb_workspaces.workspaces import Workspace, WorkspaceSettings
    except ImportError as error:
        raise UsageError(
            "the package wandb-workspaces is not installed; try pip install 'ssa-pretrain[trackers]'"
        ) from error
    settings = WorkspaceSettings(x_axis=AXES[TRAIN], remove_legends_from_panels=False, max_runs=20)
    return Workspace(entity=entity, project=project, name=name, sections=list(_sections()), settings=settings)


def spec(built: "Workspace") -> str:
    """Returns a workspace as the JSON that W&B stores."""
    return built._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n"


def _sections() -> Iterator["Section"]:
    """Yields a section per group, in the order of GROUPS."""
    from wandb_workspaces.reports.v2 import MediaBrowser
    from wandb_workspaces.workspaces import Section

    for group, title in GROUPS.items():
        panels: list = [panel for metric in METRICS if metric.group == group for panel in _panels(metric)]
        if group == "attention":
            keys = [f"{HELDOUT}/{mode}/{MASS_MAP}" for mode in MODES]
            panels.insert(0, MediaBrowser(title="Captured mass by layer", media_keys=keys, num_columns=2))
        yield Section(name=title, panels=panels, is_open=group in OPEN)


def _panels(metric: Metric) -> Iterator["LinePlot"]:
    """Yields the line plots of a metric: one per kind of record that has it."""
    from wandb_workspaces.reports.v2 import LinePlot

    if not metric.is_number or metric.key in NOT_DRAWN:
        return
    for kind in metric.kinds:
        title = f"{metric.title}, {KINDS[kind]}"
        plot: Any = partial(LinePlot, x=AXES[kind], log_y=metric.log, title_y=metric.unit)
        series = names(metric, kind)
        if metric.pattern:
            for name in series:
                yield plot(title=f"{title} ({name})", metric_regex=f"^{name}{metric.pattern}$")
        elif series:
            yield plot(title=title, y=[*series])
        else:  # the names of tasks are the user's
            yield plot(title=title, metric_regex=f"^{kind}/.+/{metric.stem}$")


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments of the command line; exits with 3 if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m ssa_pretrain.report.workspace", description="A W&B workspace with this project's metrics."
    )
    parser.add_argument("--entity", required=True, help="W&B user or team")
    parser.add_argument("--project", default="ssa_pretrain", help="W&B project, as in logging.wandb.project")
    parser.add_argument("--name", default=NAME, help="name of the view")
    parser.add_argument("--out", type=Path, help="write the view as JSON instead of saving it at W&B")
    try:
        return parser.parse_args(argv)
    except SystemExit as exiting:  # argparse's own code is 2
        sys.exit(ExitCode.CONFIGURATION if exiting.code else ExitCode.DONE)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and saves the workspace, or writes it to a file."""
    with command("report.workspace"), pipe_may_close():
        arguments = read_arguments(argv)
        built = workspace(arguments.entity, arguments.project, arguments.name)
        if arguments.out is None:
            _save(built)
            return
        try:
            write_atomically(arguments.out, spec(built))
        except OSError as error:
            raise UsageError(
                f"--out={arguments.out} cannot be written ({error.strerror}); give another file"
            ) from error
        print(f"workspace: {arguments.out}")


def _save(built: "Workspace") -> None:
    """Saves the workspace at W&B and prints its address.

    Raises:
        UsageError: W&B cannot be reached, or refuses.
    """
    import wandb

    try:
        built.save()
    except (wandb.Error, OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"W&B did not save the workspace ({first}); log in with `wandb login`, or write it with --out=FILE"
        ) from error
    print(f"workspace: {built.url}")


if __name__ == "__main__":
    main()
