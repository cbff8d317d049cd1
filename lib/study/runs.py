"""Makes the planned runs: several at a time, a failed one does not stop the rest, and what is finished is kept."""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from lib.files import UserError, read_json, shorten_path
from lib.settings import model_path
from lib.study.execution import POLL, Execution, end
from lib.study.plan import PlannedRun
from lib.study.progress import Job, Position, Progress, spell, work

FULL = re.compile("out of memory|Free memory on device")  # what PyTorch, vLLM and our own words say of a full GPU


@dataclass
class Outcome:
    """What became of a study's runs: names finished now, kept from before, and failed with the reason."""

    finished: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class ThisMachine:
    """Where runs are made without a cluster: `at_once` of them side by side.

    `places`: parameters that say on which devices a run may be; each run takes those that the fewest others are on.
    """

    longest_first = False
    base_first = False  # runs of one folder wait for its base by themselves
    shares_memory = True  # between runs that are side by side

    def __init__(self, folder: Path, at_once: int = 1, places: tuple[dict, ...] = ({},)):
        self.folder, self.at_once, self.places = folder, at_once, places
        self.taken: dict[str, dict] = {}  # run -> its place

    def prepare(self, run: PlannedRun, busy: list[PlannedRun], alone: bool = False) -> Execution:
        """The run's execution, not started yet, beside the `busy` ones; `alone`: without a part for other runs."""
        place = min(self.places, key=[self.taken[other.name] for other in busy].count)
        self.taken[run.name] = place
        place = {name: value for name, value in place.items() if not alone or name != "gpu_memory_utilization"}
        return Execution(run.notebook, self.folder / f"{run.name}.ipynb", run.parameters | place, self.folder)

    def position(self, job: Job) -> Position:
        return Position("", *job.run.steps(self.folder))

    def end(self, executions: list[Execution]) -> None:
        end(executions)

    def close(self) -> None:
        """Nothing stays open."""


def run_all(runs: list[PlannedRun], folder: Path, machine, every: float = 30.0) -> Outcome:
    """Make the runs that are not finished yet on `machine` (`ThisMachine`, or `cluster.Cluster`).

    A run that found too little memory beside others is made again after them, by itself.
    """
    outcome, crowded = Outcome(), set()
    progress = Progress([run for run in runs if not run.is_kept(folder)], every)
    waiting = [(f"[{place}/{len(runs)}] {run.name:<10}", run) for place, run in enumerate(runs, start=1)]
    if machine.longest_first:  # of each seed, so that no long run is left alone at the end
        waiting.sort(key=lambda pair: (pair[1].parameters.get("seed", 0), -work(pair[1])))
    jobs: list[Job] = []
    try:
        with progress.bars:
            while waiting or jobs:
                while waiting and len(jobs) < room(folder, machine, waiting[0][1], crowded):
                    label, run = waiting.pop(0)
                    if run.is_kept(folder):
                        outcome.kept.append(run.name)
                        progress.say(f"{label} kept, finished before{accuracy(folder / run.name)}")
                        continue
                    again = (folder / run.name).is_dir()
                    execution = machine.prepare(run, [job.run for job in jobs], run.name in crowded)
                    jobs.append(Job(label, run, execution, again))
                    jobs[-1].execution.start()  # after it is among the jobs, so that it is ended below
                progress.tick([(job, machine.position(job)) for job in jobs])
                time.sleep(POLL)
                for job in [job for job in jobs if not job.execution.is_running()]:
                    conclude(job, folder, outcome, progress)
                    jobs.remove(job)
                    alone = machine.at_once == 1 or not machine.shares_memory or job.run.name in crowded
                    if not alone and FULL.search(outcome.failed.get(job.run.name, "")):
                        del outcome.failed[job.run.name]
                        crowded.add(job.run.name)
                        waiting.append((job.label, job.run))
                        progress.expect(job.run)
                        progress.say(f"{job.label} is made again after the others, by itself")
    finally:
        machine.end([job.execution for job in jobs])
    return outcome


def room(folder: Path, machine, run: PlannedRun, crowded: set[str]) -> int:
    """How many runs may be at work at a time, before `run` starts; those that were `crowded` are made one by one."""
    # The untrained base is measured by the first run and reused by the others. Where they share no folder, each would
    # measure it side by side: so they go one by one until some base is there.
    alone = machine.base_first and run.measures_base and not any(folder.glob("base-*/settings.json"))
    return 1 if alone or run.name in crowded else machine.at_once


def conclude(job: Job, folder: Path, outcome: Outcome, progress: Progress) -> None:
    path, reason = folder / job.run.name, job.execution.result()
    took = spell(time.monotonic() - job.started)
    if reason is None and not job.run.is_finished(folder):
        reason = f"the notebook ran to its end, but {shorten_path(path)} has no result"
    progress.over(job)
    if reason is None:
        outcome.finished.append(job.run.name)
        progress.say(f"{job.label} finished in {took}{accuracy(path)}")
    else:
        outcome.failed[job.run.name] = reason
        progress.say(f"{job.label} FAILED after {took}: {reason}")


def find_places(settings: dict, at_once: int, given: set[str]) -> tuple[dict, ...]:
    """Devices for runs side by side: on two GPUs every other run takes them the other way round.

    `settings`: the resolved ones that the runs share; `given`: names of what the user set.
    """
    train, evaluate = settings.get("train_device"), settings.get("eval_device")
    if at_once == 1 or train == evaluate or given & {"train_device", "eval_device"}:
        return ({},)
    return tuple({"train_device": a, "eval_device": b} for a, b in ((train, evaluate), (evaluate, train)))


def engine_share(settings: dict, at_once: int, places: int) -> float | None:
    """Share of a GPU's memory for the engine of each of `at_once` runs on `places`: what the policies there leave.

    A run by itself plans it when its engine starts; it can't know of a policy that another run will load later.
    """
    if at_once == 1 or settings["eval_device"] == "cpu" or settings["gpu_memory_utilization"] is not None:
        return None
    from lib.evaluation import memory
    from lib.evaluation.engine import DTYPES

    both = places > 1 or settings["train_device"] == settings["eval_device"]
    count = -(-at_once // places)  # of policies on one card, and of engines
    model = model_path(settings["model"])  # which is shown by a short path
    shape = memory.model_shape(model, settings["trust_remote_code"], settings["revision"])
    total, _ = memory.card_memory(settings["eval_device"])
    asked = {name: settings.get(name) for name in ("microbatch_tokens", "optimizer", "recompute")}
    each = memory.plan_savings(total, shape, **asked)  # as the run will plan it
    policies = count * memory.policy_bytes(shape, each.microbatch_tokens, memory.BYTES[each.optimizer], each.recompute)
    engines = count * memory.engine_bytes(shape, DTYPES[settings["precision"]].itemsize, 0, 0)  # with no response yet
    if policies + (engines if both else 0) >= memory.SPARE * total:
        beside = f" and {count} of the engines ({engines / memory.GIB:.0f} GiB at least)" if both else ""
        raise UserError(
            f"--jobs {at_once}: a GPU of {total / memory.GIB:.0f} GiB is too small for {count} of the policies "
            f"({policies / memory.GIB:.0f} GiB){beside}; lower it, or -p microbatch_tokens"
        )
    return round((memory.SPARE * total - (policies if both else 0)) / total / count, 3)


def accuracy(folder: Path) -> str:
    summary = read_json(folder / "summary.json")
    if summary.get("final_accuracy") is None:
        return ""
    low, high = summary["final_accuracy_low"], summary["final_accuracy_high"]
    return f": accuracy {summary['final_accuracy'] * 100:.1f} % ({low * 100:.1f} to {high * 100:.1f})"
