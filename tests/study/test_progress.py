"""What a study says of the time: where each run is, and how long the rest may take."""

import json
from pathlib import Path

import pytest

from lib.study.plan import PlannedRun
from lib.study.progress import Job, Position, Progress, spell


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def planned(n) -> PlannedRun:
    return PlannedRun(f"n{n}", {"n": n, "filtered": False}, Path("train.ipynb"))


def test_time_left_is_the_work_left_at_the_speed_so_far():
    """Recomputed by hand: seconds so far, times work left, over work done. Half of n128 and then all of it are done."""
    clock = Clock()
    runs = [planned(128), planned(256), planned(1024)]
    progress = Progress(runs, every=1e9, clock=clock)
    work = {128: 128 + 512, 256: 256 + 512, 1024: 1024 + 512}
    job = Job("[1/3] n128", runs[0], None)
    progress.tick([(job, Position("", 0, 4))])
    assert progress.left() == "", "nothing is known yet"
    clock.now += 60
    progress.tick([(job, Position("", 1, 4))])
    clock.now += 60
    progress.tick([(job, Position("", 2, 4))])
    # rich measures from the first sample on: the quarter between the first and the second step took 60 s
    left = (sum(work.values()) - work[128] / 2) / (work[128] / 4 / 60)
    assert progress.left() == f", about {spell(left)} left in all"
    clock.now += 120
    progress.over(job)
    left = (work[256] + work[1024]) / (work[128] * 3 / 4 / 180)
    assert progress.left() == f", about {spell(left)} left in all"


@pytest.mark.parametrize(
    ("position", "said"),
    [
        (Position("", 0, 0), "before its first step"),
        (Position("", 3, 4), "step 3 of 4"),
        (Position("", 4, 4), "last evaluation"),
        (Position("gpu-7", 3, 4), "step 3 of 4 on gpu-7"),
    ],
)
def test_a_position_in_words(position, said):
    assert str(position) == said


def test_each_run_at_work_has_its_line(tmp_path, capsys):
    clock = Clock()
    runs = [planned(128), planned(256)]
    (tmp_path / "n256").mkdir()
    (tmp_path / "n256/config.json").write_text(json.dumps({"data": {"train_steps": 4}}))
    (tmp_path / "n256/metrics.jsonl").write_text("{}\n" * 3)
    progress = Progress(runs, every=0, clock=clock)
    jobs = [Job(f"[{i}/6] {run.name}", run, None, again=i == 2) for i, run in enumerate(runs, 1)]
    places = [(job, Position("", *job.run.steps(tmp_path))) for job in jobs]
    progress.every = 1
    progress.tick(places)
    clock.now += 60
    progress.tick([*places, (Job("[3/6] n512", planned(512), None), Position(None, 0, 0))])  # waits for a place
    assert capsys.readouterr().out.splitlines() == [
        "[1/6] n128 started",
        "[2/6] n256 started again: it was not finished",
        "[1/6] n128 before its first step, 0:01:00",
        "[2/6] n256 step 3 of 4, 0:01:00",
    ]


def test_a_terminal_has_a_bar_for_each_run_and_its_lines_stay(monkeypatch):
    import io

    from rich.console import Console

    screen = io.StringIO()
    monkeypatch.setattr(
        "lib.study.progress.Console", lambda **options: Console(file=screen, force_terminal=True, width=120, **options)
    )
    run = planned(128)
    progress = Progress([run])
    with progress.bars:
        job = Job("[1/1] n128", run, None)
        progress.tick([(job, Position("", 2, 4))])
        progress.bars.refresh()
        progress.say("[1/1] n128 finished in 0:01:00")
    assert "step 2 of 4" in screen.getvalue() and "all runs" in screen.getvalue()
    assert "[1/1] n128 finished in 0:01:00\n" in screen.getvalue()
