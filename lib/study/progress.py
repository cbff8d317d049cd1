"""What a study says while it runs: a line for what happened, bars on a terminal, a line now and then elsewhere."""

import time
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from lib.study.plan import PlannedRun

FULL_SET = 2048  # examples, about: as many as both profiles have


@dataclass
class Job:
    """A run at work: what its lines begin with, and its notebook's execution."""

    label: str
    run: PlannedRun
    execution: object
    again: bool = False  # whether a run of the same name was not finished
    started: float = field(default_factory=time.monotonic)  # or when it got its place on a cluster
    said: bool = False  # that it started


@dataclass(frozen=True)
class Position:
    """How far a run is: `node` of a cluster (None: waiting for one; empty: this machine), steps made, steps in all."""

    node: str | None
    step: int
    steps: int

    def __str__(self) -> str:
        where = f" on {self.node}" if self.node else ""
        if not self.step:
            return f"before its first step{where}"
        return ("last evaluation" if self.step == self.steps else f"step {self.step} of {self.steps}") + where


class Progress:
    """Time left is what rich makes of the work done since the study began. `runs`: those to be made."""

    def __init__(self, runs: list[PlannedRun], every: float = 30.0, clock=time.monotonic):
        self.every, self.clock, self.last = every, clock, clock()
        self.console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[position]}")]
        self.bars = Bars(
            *(*columns, TimeElapsedColumn(), TimeRemainingColumn()),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            speed_estimate_period=float("inf"),  # from the beginning: runs train in bursts, evaluations between them
            get_time=clock,
        )
        self.all = self.bars.add_task("all runs", total=0.0, position="")
        for run in runs:
            self.expect(run)
        self.bar_of: dict[str, int] = {}
        self.ended = 0.0  # work of the runs that are over

    def expect(self, run: PlannedRun) -> None:
        """Count a run that is to be made."""
        self.bars.update(self.all, total=self.bars.tasks[self.all].total + work(run))

    def say(self, text: str) -> None:
        self.console.print(text)
        self.last = self.clock()

    def tick(self, jobs: list[tuple[Job, Position]]) -> None:
        """Note where the running jobs are, and say it now and then."""
        done, jobs = self.ended, [(job, position) for job, position in jobs if position.node is not None]
        for job, position in jobs:
            if not job.said:
                job.said, job.started = True, self.clock()
                self.say(f"{job.label} started{' again: it was not finished' if job.again else ''}")
            share = position.step / position.steps if position.steps else 0.0
            done += work(job.run) * share
            if job.label not in self.bar_of:
                self.bar_of[job.label] = self.bars.add_task(job.label, total=1, position="")
            self.bars.update(self.bar_of[job.label], completed=share, position=str(position))
        self.bars.update(self.all, completed=done)
        if self.console.is_terminal or not jobs or self.clock() - self.last < self.every:
            return
        self.last = self.clock()
        for job, position in jobs:
            self.console.print(f"{job.label} {position}, {spell(self.last - job.started)}{self.left()}")

    def left(self) -> str:
        seconds = self.bars.tasks[self.all].time_remaining
        return f", about {spell(seconds)} left in all" if seconds else ""

    def over(self, job: Job) -> None:
        """Count a run that has ended, well or not."""
        self.ended += work(job.run)
        self.bars.update(self.all, completed=self.ended)
        if job.label in self.bar_of:
            self.bars.remove_task(self.bar_of.pop(job.label))


def work(run: PlannedRun) -> float:
    """Examples that a run sees, and as many as take about as long as its engine's start and its evaluations."""
    n = run.parameters.get("n", "all")  # a tuning's is the notebook's default
    return (FULL_SET if n == "all" else n) * (run.parameters.get("epochs") or 1) + FULL_SET / 4


def spell(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:30."""
    return str(timedelta(seconds=round(seconds)))
