"""A rank of test_agreement.py: rank 1 cannot write the second checkpoint; in the case "agreed" all ranks agree on that and save again."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from ssa_pretrain import run_folder
from ssa_pretrain.checkpoint import publish as publishing
from ssa_pretrain.checkpoint.publish import publish
from ssa_pretrain.errors import CheckpointError
from ssa_pretrain.parallel import agreement
from ssa_pretrain.run import require_shared_folder
from ssa_pretrain.settings.problems import ConfigError, Problem


def save_on_separate_disks(run: Path, output: Path, rank: int) -> None:
    """Writes the errors of a run's first check, and of a save without it, to `output`: each rank's folder is on a separate disk."""
    run_folder.marker_is_visible.__kwdefaults__["patience"] = 0.5
    publishing.VISIBLE_SECONDS = 0.5
    run.mkdir()

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"part_{rank}").write_bytes(bytes(100))

    placement = SimpleNamespace(is_rank_0=rank == 0, world_size=2)
    for act in (
        lambda: require_shared_folder(run, placement),  # type: ignore[arg-type]
        lambda: publish(run, 1, {}, write, keep=1, is_rank_0=rank == 0),
    ):
        try:
            act()
        except (ConfigError, CheckpointError) as error:
            with output.open("a") as file:
                file.write(f"{error}\n")


def main(case: str, run: Path) -> None:
    """Runs a case."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if case == "barrier_in_save":
        agreement.GRACE_SECONDS = 2.0  # rank 0 waits for ever

    def write(folder: Path) -> None:
        (folder / f"part_{rank}").write_bytes(bytes(100))

    def failing_write(folder: Path) -> None:
        if case == "agreed":
            parts = agreement.Attempts()
            parts.run(lambda: write_or_fail(folder))
            dist.barrier()  # like a collective between the writes
            parts.agree()
            raise AssertionError("a rank went on")
        write_or_fail(folder)

    def write_or_fail(folder: Path) -> None:
        if rank == 1:
            raise OSError(28, "No space left on device")
        if case == "barrier_in_save":
            dist.barrier()  # like a library that expects every rank
        write(folder)

    def raise_config_error() -> None:
        raise ConfigError([Problem("output_dir", "x", "is in use")])

    read = publishing.file_sha256

    def recorded_hash(path: Path) -> str:
        with (run / f"read_{rank}").open("a") as file:
            file.write(path.name + "\n")
        return read(path)

    if case == "differing_settings":
        values = {
            "optim.lr": (0.1, 0.1, 0.5)[rank],
            "seed": 1,
            "data": "abc",
            "version of torch": ("2.13", "2.13", None)[rank],
        }
        (run / f"message_{rank}").write_text(repr(agreement.differences_from_rank_0(values)))
        assert agreement.differences_from_rank_0({"seed": 1}) == []
        dist.destroy_process_group()
        return
    if case == "separate_disks":  # each rank's output folder is on a separate disk
        save_on_separate_disks(run / str(rank), run / f"message_{rank}", rank)
        dist.destroy_process_group()
        return
    publishing.file_sha256 = recorded_hash
    publish(run, 1, {}, write, keep=1, is_rank_0=rank == 0)
    try:
        if case == "rank_0_fails":
            agreement.on_rank_0(raise_config_error, is_rank_0=rank == 0, errors=(ConfigError,))
        publish(run, 2, {}, failing_write, keep=1, is_rank_0=rank == 0)
    except (CheckpointError, ConfigError) as error:
        (run / f"message_{rank}").write_text(str(error))
        (run / f"error_{rank}").write_text(type(error).__name__)
        if case == "agreed":
            publish(run, 3, {}, write, keep=1, is_rank_0=rank == 0)
        dist.destroy_process_group()
        return
    raise AssertionError("the save went through")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
