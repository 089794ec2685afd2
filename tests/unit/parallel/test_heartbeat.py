"""Who is missing when a run hangs, from the beats of all ranks; who is a straggler, from their own times."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

from ssa_pretrain.parallel.heartbeat import Beat, missing, waits_for_others
from ssa_pretrain.parallel.stragglers import REPEATED, WINDOW, OwnTime, Stragglers, slow_ranks


def ranks(beats: list[Beat]) -> list[int]:
    return [beat.rank for beat in beats]


def test_beat_survives_the_store() -> None:
    beat = Beat(3, "node2", 4711, 7, "training", 12, 30, 1.5, None, {"tp": 3}, True, ["a.py:1 in f"], 0.25, 12, 1, 99.0)
    assert Beat.decode(beat.encode()) == beat
    assert (beat.name, beat.place) == ("rank 3 (node2, pid 4711)", "training step 13")
    assert replace(beat, phase="saving").place == "saving after step 12"


def test_silent_ranks_come_before_all_others() -> None:
    beats = [Beat(0, order=3), Beat(1, order=2), Beat(2, order=3)]
    assert ranks(missing(beats, {2})) == [2]
    assert ranks(missing(beats)) == [1]


def test_the_rank_that_nobody_else_waits_for_is_found_on_every_mesh_and_for_every_culprit() -> None:
    """tp 2 x dp 3: the culprit does not call its next tensor collective; its peer waits there, all others in their data group."""
    coordinates = list(product(range(3), range(2)))  # (dp, tp)
    for culprit in range(6):
        beats = []
        for rank, (dp, tp) in enumerate(coordinates):
            in_pair = dp == coordinates[culprit][0]
            tensor = 9 if rank == culprit else 10 if in_pair else 12
            data = 4 if in_pair else 5
            beats.append(
                Beat(rank, collectives={f"tp{dp}": tensor, f"dp{tp}": data, "world": 1}, waits=rank != culprit)
            )
        assert ranks(missing(beats)) == [culprit]
        assert ranks(missing([replace(beat, waits=True) for beat in beats])) == [culprit]


def test_stages_of_a_pipeline_are_told_apart_by_what_they_execute() -> None:
    beats = [Beat(0, waits=True), Beat(1), Beat(2, waits=True)]
    assert ranks(missing(beats)) == [1]
    assert ranks(missing([replace(beat, waits=True) for beat in beats])) == [0, 1, 2]


def test_main_thread_at_an_instruction_without_a_line_waits_if_its_file_says_so() -> None:
    for path, waits in (("torch/distributed/distributed_c10d.py", True), (__file__, False)):
        frame = SimpleNamespace(f_code=SimpleNamespace(co_filename=path), f_lineno=None)
        assert waits_for_others(frame) is waits  # type: ignore[arg-type]


def test_own_time_is_a_median_over_a_full_window() -> None:
    own = OwnTime()
    for seconds in [1.0] * (WINDOW // 2 + 1) + [50.0] * (WINDOW // 2 - 2):
        own.add(seconds)
    assert own.median is None
    own.add(50.0)
    assert own.median == 1.0


def beats(*seconds: float | None, trained: int) -> list[Beat]:
    return [Beat(n, f"node{n}", own_seconds=one, trained=trained + n % 2) for n, one in enumerate(seconds)]


def test_straggler_is_named_after_two_windows_and_not_in_every_one() -> None:
    one, said = Stragglers(), []
    for window in range(1, 2 * REPEATED):
        line = one.check(beats(1.0, 1.1, 1.0, 1.6, trained=window * WINDOW))
        assert one.check(beats(9.0, 1.0, 1.0, 1.0, trained=window * WINDOW + 1)) is None  # the same window
        said += [(window, line)] if line else []
    assert [window for window, _ in said] == [2, 2 + REPEATED]
    assert said[0][1] == "slow: rank 3 (node3) 1.6 s, 1.6 times the median rank's own time per step (1 s)"


def test_noise_names_nobody() -> None:
    one = Stragglers()
    for window in range(1, 50):  # another rank is slow in each window
        seconds = [4.0 if rank == window % 4 else 1.0 for rank in range(4)]
        assert one.check(beats(*seconds, trained=window * WINDOW)) is None
    assert slow_ranks(beats(1.0, 1.49, 1.2, 0.8, trained=0)) == {}
    assert slow_ranks(beats(1.0, None, 9.0, trained=0)) == {}
    assert slow_ranks(beats(1.0, 1.6, trained=0)) == {1: 1.6}  # of two ranks the faster one counts
