"""Runs a study: one executed notebook a training set, then the report.

Each run is `papermill notebooks/train.ipynb <runs_dir>/<run>.ipynb` in a process of its own, one after another, or
several side by side (--jobs).
Finished runs are kept, so a stopped study goes on where it stopped: call it again with the same arguments.
"""

import argparse
import difflib
import hashlib
import json
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import numpy as np

from lib.files import PROJECT_ROOT, UserError, shorten_path
from lib.report.numbers import load
from lib.run.lock import hold, release
from lib.settings import INCIDENTAL, PROFILES, default_run_name, resolve
from lib.study.execution import POLL, Execution, end, execute, notebook_parameters, read_value, sweep, to_html

TRAIN_NOTEBOOK = PROJECT_ROOT / "notebooks/train.ipynb"
ANALYSIS_NOTEBOOK = PROJECT_ROOT / "notebooks/analysis.ipynb"
SIZES = ("128", "256", "512", "1024", "all", "filtered")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OWN_ARGUMENTS = {"n": "--sizes", "filtered": "--sizes", "seed": "--seeds", "runs_dir": "--runs-dir"}


class Stopped(BaseException):
    """The study was told to stop by a signal. No Exception, so that nothing on the way takes it for a failed run."""


@dataclass(frozen=True)
class Run:
    """One notebook to execute: its name and every parameter passed to it."""

    name: str
    parameters: dict


@dataclass(frozen=True)
class Job:
    """A run at work: what its lines begin with, and since when (`time.monotonic`)."""

    label: str
    run: Run
    execution: Execution
    started: float
    place: dict = field(default_factory=dict)  # its devices, where the study chooses them


@dataclass
class Outcome:
    """What became of a study's runs: names finished now, kept from before, and failed with the reason."""

    finished: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


# --- The plan ------------------------------------------------------------------------------------------------------


def plan(runs_dir, sizes=SIZES, seeds=(0,), shared=None, notebook=TRAIN_NOTEBOOK) -> list[Run]:
    """The runs of a study in the order in which they are made. UserError for a size or parameter that doesn't exist."""
    defaults = notebook_parameters(notebook)
    shared = dict(shared or {})
    check_names(shared, defaults)
    runs = []
    for seed in seeds:
        for size in sizes:
            n, filtered = read_size(size)
            name = default_run_name(n, filtered, seed)
            own = {"n": n, "filtered": filtered, "seed": seed, "run_name": name}
            own["runs_dir"] = shorten_path(str(runs_dir))
            runs.append(Run(name, {**shared, **own}))
    return runs


def read_size(size: str) -> tuple[int | str, bool]:
    """`n` and `filtered` of a size as written on the command line: a number, all, or filtered."""
    if size in ("all", "filtered"):
        return "all", size == "filtered"
    if not size.isdigit() or int(size) < 1:
        raise UserError(f"--sizes {size}: must be a positive number, 'all' or 'filtered'")
    return int(size), False


def check_names(parameters: dict, defaults: dict) -> None:
    """papermill only warns about a name that the notebook does not know, and runs with the default: refuse it here."""
    for name, value in parameters.items():
        if name in OWN_ARGUMENTS:
            raise UserError(f"-p {name}: the study sets it; use {OWN_ARGUMENTS[name]}")
        if name == "run_name":
            raise UserError("-p run_name: the study names its runs; use --runs-dir to keep studies apart")
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(defaults))}"
            raise UserError(f"-p {name}: the notebook has no such parameter; {hint}")
        if isinstance(defaults[name], bool) and not isinstance(value, bool):
            raise UserError(f"-p {name} {value}: must be True or False")


def match_steps(runs: list[Run], values: dict) -> list[Run]:
    """The same runs with `epochs` such that each takes as many optimizer steps as the full set with its own epochs.

    `values`: the resolved settings that the runs share.
    """
    from lib.data import load_examples, select_examples
    from lib.training.batching import number_of_steps

    data_dir = PROJECT_ROOT / Path(values["data_dir"]).expanduser()
    examples, _ = load_examples(data_dir, values.get("prompt_template"))
    sizes = select_examples(examples, "all", False, 0).sizes
    steps = number_of_steps(sizes["distinct"], values["batch_size"], values["epochs"], values["max_steps"])
    matched = []
    for run in runs:
        n, filtered = run.parameters["n"], run.parameters["filtered"]
        if filtered and sizes["correct"] is None:
            raise UserError("--match steps: sft.jsonl lacks gold answers, so the size of the filtered set is not known")
        selected = n if n != "all" else sizes["correct"] if filtered else sizes["distinct"]
        epochs = round(steps * values["batch_size"] / selected, 6)
        matched.append(Run(run.name, {**run.parameters, "epochs": epochs}))
    return matched


# --- What is there already -----------------------------------------------------------------------------------------


def is_finished(folder: Path) -> bool:
    return read_json(folder / "summary.json").get("status") == "finished"


def is_kept(run: Run, folder: Path) -> bool:
    """Whether the study has nothing to do for this run."""
    return is_finished(folder / run.name) and not run.parameters.get("overwrite")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def differences(run: Run, folder: Path, defaults: dict) -> list[str]:
    """Settings of a finished run that are not the ones asked for now, in words."""
    made = read_json(folder / "config.json").get("parameters", {})
    asked = {**defaults, **run.parameters}
    by_profile = PROFILES.get(made.get("profile") if asked.get("profile") == "auto" else asked.get("profile"), {})
    found = []
    for name, value in asked.items():
        value = by_profile.get(name) if value is None else value
        # None leaves to the profile what profiles set; of anything else it is a value ("all", "no limit").
        open_to_all = (value is None and name in PROFILES["math"]) or (name, value) == ("profile", "auto")
        if name in made and name not in INCIDENTAL and not open_to_all and shown(value) != shown(made[name]):
            found.append(f"{name} is {shown(made[name])} there, {shown(value)} is asked for")
    return found


def shown(value):
    """A setting as config.json has it: folders of the project relative to its root."""
    if isinstance(value, str) and value.startswith((".", "/", "~")):
        path = Path(value).expanduser()
        return shorten_path(str(path if path.is_absolute() else (PROJECT_ROOT / path).resolve()))
    return value


def refuse_conflicts(runs: list[Run], folder: Path, defaults: dict) -> None:
    """UserError where a finished run of the folder was made with other settings: two studies don't mix."""
    conflicts = []
    for run in runs:
        if is_kept(run, folder):
            found = differences(run, folder / run.name, defaults)
            conflicts += [f"  {shorten_path(str(folder / run.name))}: {'; '.join(found)}"] if found else []
    if conflicts:
        raise UserError(
            "finished runs differ from what is asked for:\n" + "\n".join(conflicts) + "\n"
            "Ask for the same settings, or keep this study apart with another --runs-dir, or delete these runs, "
            "or replace them all with -p overwrite True."
        )


# --- Progress ------------------------------------------------------------------------------------------------------


class Progress:
    """Says what is happening and how long it may still take; on a terminal the passing line is overwritten."""

    def __init__(self, folder: Path, every: float = 30.0, side_by_side: int = 1):
        self.folder, self.every, self.side_by_side = folder, every, side_by_side
        self.done: list[tuple[float, float]] = []  # examples and seconds of the runs made so far
        self.last = time.monotonic()

    def say(self, text: str) -> None:
        print(("\r\033[K" if sys.stdout.isatty() else "") + text, flush=True)
        self.last = time.monotonic()

    def tick(self, jobs: list[Job], waiting: list[Run]) -> None:
        """Now and then, say where the running jobs are; `waiting`: the runs after them."""
        terminal = sys.stdout.isatty()
        if not jobs or time.monotonic() - self.last < (1 if terminal else self.every):
            return
        self.last = time.monotonic()
        left = self.left(jobs, [run for run in waiting if not is_kept(run, self.folder)])
        if not terminal:
            for job in jobs:
                print(f"{self.line(job)}{left}", flush=True)
            return
        text = self.line(jobs[0]) + left
        if len(jobs) > 1:
            text = " | ".join(f"{job.run.name} {self.position(job.run)}" for job in jobs) + left
            text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps can't be overwritten
        print(f"\r\033[K{text}", end="", flush=True)

    def line(self, job: Job) -> str:
        return f"{job.label} {self.position(job.run)}, {clock(self.last - job.started)}"

    def position(self, run: Run) -> str:
        steps, total = self.steps(run)
        return "setting up" if not steps else "last evaluation" if steps == total else f"step {steps} of {total}"

    def steps(self, run: Run) -> tuple[int, int]:
        total = read_json(self.folder / run.name / "config.json").get("data", {}).get("train_steps") or 0
        metrics = self.folder / run.name / "metrics.jsonl"
        return (metrics.read_bytes().count(b"\n") if metrics.is_file() else 0), total

    def left(self, jobs: list[Job], pending: list[Run]) -> str:
        """Time left: from the runs made before, and not less than each running one's share of steps says."""
        by_steps = [self.by_steps(job) for job in jobs]
        if not self.done and not any(by_steps):
            return ""
        longest, ahead = max(by_steps), []
        for job, share in zip(jobs, by_steps, strict=True):
            whole = max(share, self.expected(job.run) if self.done else longest)
            ahead.append(max(whole - (self.last - job.started), 0.0))
        rest = sum(self.expected(run) if self.done else longest for run in pending)
        seconds = max(*ahead, (sum(ahead) + rest) / self.side_by_side)
        # Nothing is known of a last evaluation, which no step measures.
        return f", about {clock(seconds)} left in all" if seconds >= 1 else ""

    def by_steps(self, job: Job) -> float:
        """Seconds that the whole run takes if its steps go on as they did; 0 before the first."""
        steps, total = self.steps(job.run)
        return (self.last - job.started) * total / steps if steps else 0.0

    def expected(self, run: Run) -> float:
        """Seconds of a run: a straight line over examples through the runs made so far, their mean with one."""
        examples, seconds = zip(*self.done, strict=True)
        if len(set(examples)) < 2:
            return float(np.mean(seconds))
        return max(float(np.polyval(np.polyfit(examples, seconds, 1), self.examples(run))), min(seconds) / 2)

    def examples(self, run: Run) -> float:
        """Examples that a run trains on, times its epochs where the runs have epochs of their own."""
        n, data = run.parameters["n"], self.any_data()
        if n == "all":
            n = data.get("correct" if run.parameters["filtered"] else "distinct") or 2048
        return n * run.parameters.get("epochs", 1)

    def any_data(self) -> dict:
        return next((read_json(path).get("data", {}) for path in self.folder.glob("*/config.json")), {})

    def finished(self, run: Run, seconds: float | None) -> None:
        if seconds:
            self.done.append((self.examples(run), seconds))


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def accuracy(folder: Path) -> str:
    summary = read_json(folder / "summary.json")
    if summary.get("final_accuracy") is None:
        return ""
    low, high = summary["final_accuracy_low"], summary["final_accuracy_high"]
    return f": accuracy {summary['final_accuracy'] * 100:.1f} % ({low * 100:.1f} to {high * 100:.1f})"


# --- The study -----------------------------------------------------------------------------------------------------


def run_all(
    runs: list[Run],
    folder: Path,
    notebook: Path = TRAIN_NOTEBOOK,
    every: float = 30.0,
    side_by_side: int = 1,
    places: tuple[dict, ...] = ({},),
) -> Outcome:
    """Make the runs that are not finished yet, up to `side_by_side` at a time; a failed one does not stop the rest.

    `places`: parameters that say on which devices a run may be; each takes those that the fewest others are on.
    """
    outcome, progress = Outcome(), Progress(folder, every, side_by_side)
    waiting = [(f"[{place}/{len(runs)}] {run.name:<10}", run) for place, run in enumerate(runs, start=1)]
    jobs: list[Job] = []
    try:
        while waiting or jobs:
            while waiting and len(jobs) < room(folder, side_by_side):
                label, run = waiting.pop(0)
                if is_kept(run, folder):
                    keep(label, run, outcome, progress)
                    continue
                path = folder / run.name
                progress.say(f"{label} started{' again: it was not finished' if path.is_dir() else ''}")
                place = min(places, key=[job.place for job in jobs].count)
                execution = Execution(notebook, path.with_suffix(".ipynb"), run.parameters | place, folder)
                jobs.append(Job(label, run, execution, time.monotonic(), place))
                execution.start()  # after it is among the jobs, so that it is ended below
            progress.tick(jobs, [run for _, run in waiting])
            time.sleep(POLL)
            for job in [job for job in jobs if not job.execution.is_running()]:
                conclude(job, outcome, progress)
                jobs.remove(job)
    finally:
        end([job.execution for job in jobs])
    return outcome


def find_places(settings: dict, side_by_side: int, given: set[str]) -> tuple[dict, ...]:
    """Devices for runs side by side: on two GPUs every other run takes them the other way round, to use both evenly.

    `settings`: the resolved ones that the runs share; `given`: names of what the user set.
    """
    train, evaluate = settings.get("train_device"), settings.get("eval_device")
    if side_by_side == 1 or train == evaluate or given & {"train_device", "eval_device"}:
        return ({},)
    return tuple({"train_device": a, "eval_device": b} for a, b in ((train, evaluate), (evaluate, train)))


def room(folder: Path, side_by_side: int) -> int:
    """How many runs may be at work at a time."""
    # The untrained base is measured by the first run and reused by the others: side by side, each would measure it. So
    # runs go one by one until some base is there. One that needs another base measures it itself: right, only slower.
    return side_by_side if any(folder.glob("base-*/settings.json")) else 1


def keep(label: str, run: Run, outcome: Outcome, progress: Progress) -> None:
    """Count a run that was finished before."""
    path = progress.folder / run.name
    outcome.kept.append(run.name)
    progress.finished(run, read_json(path / "summary.json").get("seconds", {}).get("total"))
    progress.say(f"{label} kept, finished before{accuracy(path)}{lost_notebook(path)}")


def conclude(job: Job, outcome: Outcome, progress: Progress) -> None:
    """Say and count what became of a run whose notebook has ended."""
    path = progress.folder / job.run.name
    seconds = time.monotonic() - job.started
    reason = job.execution.result()
    if reason is None and not is_finished(path):
        reason = f"the notebook ran to its end, but {shorten_path(str(path / 'summary.json'))} is missing"
    if reason is None:
        outcome.finished.append(job.run.name)
        progress.finished(job.run, seconds)
        progress.say(f"{job.label} finished in {clock(seconds)}{accuracy(path)}")
    else:
        outcome.failed[job.run.name] = reason
        progress.say(f"{job.label} FAILED after {clock(seconds)}: {reason}")


def lost_notebook(path: Path) -> str:
    if path.with_suffix(".ipynb").is_file():
        return ""
    return f" (its notebook {path.name}.ipynb is missing: delete the folder {path.name} to make both again)"


def check_settings(run: Run, defaults: dict) -> dict:
    """All settings of a run as the notebook will resolve them; UserError before anything is started."""
    return resolve({**defaults, **run.parameters, "overwrite": True}).to_dict()


def run_study(arguments: argparse.Namespace) -> Outcome:
    """Plan, refuse what can't work, make what is missing."""
    folder, notebook = arguments.runs_dir, arguments.train
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: must be at least 1")
    shared = {"profile": arguments.profile, **dict(arguments.p)}
    runs = plan(folder, arguments.sizes, arguments.seeds, shared, notebook)
    defaults = notebook_parameters(notebook)
    hold(folder, "--runs-dir")
    try:
        if left := sweep(folder):
            print(f"Ended {left} processes that a killed study had left behind.")
        pending, places = [run for run in runs if not is_kept(run, folder)], ({},)
        if pending or arguments.match == "steps":
            settings = check_settings(pending[0] if pending else runs[0], defaults)
            runs = settled(runs, settings, arguments.match)
            places = find_places(settings, arguments.jobs, set(shared))
        refuse_conflicts(runs, folder, defaults)
        return run_all(runs, folder, notebook, side_by_side=arguments.jobs, places=places)
    finally:
        release(folder)


def settled(runs: list[Run], values: dict, match: str) -> list[Run]:
    """The runs with the profile decided once for all of them, and their epochs where steps are matched."""
    if "profile" in values:
        runs = [Run(run.name, {**run.parameters, "profile": values["profile"]}) for run in runs]
    return match_steps(runs, values) if match == "steps" else runs


# --- The report ----------------------------------------------------------------------------------------------------


def make_report(folder: Path, again: bool = False) -> Path:
    """Execute the analysis to report.ipynb and report.html in `folder`; kept as they are where nothing is new."""
    load(folder)  # a folder that can't be reported on is refused here, in a sentence
    notebook, page = folder / "report.ipynb", folder / "report.html"
    inputs = fingerprint(folder)
    if not again and page.is_file() and read_json(notebook).get("metadata", {}).get("inputs") == inputs:
        return page
    reason = execute(ANALYSIS_NOTEBOOK, notebook, {"runs_dir": shorten_path(str(folder))}, folder)
    if reason:
        raise UserError(f"the report could not be made: {reason} (see {shorten_path(str(folder))}/report.failed.ipynb)")
    content = nbformat.read(notebook, as_version=4)
    content.metadata["inputs"] = inputs
    to_html(content, page, "Supervised fine-tuning on MATH: report")
    nbformat.write(content, notebook)
    return page


def fingerprint(folder: Path) -> str:
    """SHA-256 over everything that the report is made from: the runs' files, the analysis and its code."""
    found = [path for pattern in ("*/*.json", "*/*.jsonl", "*/evaluations/*.jsonl*") for path in folder.glob(pattern)]
    code = [PROJECT_ROOT / "lib" / f"{name}.py" for name in ("report", "figures", "findings", "tables", "notebooks")]
    digest = hashlib.sha256()
    for path in [ANALYSIS_NOTEBOOK, *code, *sorted(found)]:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


# --- Command line --------------------------------------------------------------------------------------------------


def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lib.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m lib.study                                            everything, wherever it runs, and the report
  python -m lib.study --profile mini --sizes 128 all             two runs
  python -m lib.study --runs-dir runs/math --profile math -p data_dir /data/a5-alignment/MATH -p learning_rate 4e-5
  python -m lib.study --runs-dir runs/equal-steps --match steps  each size trained for equally many steps
  python -m lib.study --report-only                              the report on what is there

Stop it with Ctrl-C; the same command goes on where it stopped. Exit status: 0 all runs finished, 1 a run failed,
2 a mistake in the arguments, 130 stopped.""",
    )
    option = parser.add_argument
    profile_help = "auto: math where a GPU and the course's data are, otherwise mini (default: auto)"
    option("--profile", default="auto", choices=("auto", *PROFILES), help=profile_help)
    option("--runs-dir", default="runs", help="folder of the study (default: runs)")
    option("--sizes", nargs="+", default=SIZES, metavar="SIZE", help=f"default: {' '.join(SIZES)}")
    option("--seeds", nargs="+", default=[0], type=int, metavar="SEED", help="a set of runs for each (default: 0)")
    match_help = "what all sizes share; with steps, each takes as many as the full set does (default: epochs)"
    option("--match", default="epochs", choices=("epochs", "steps"), help=match_help)
    other_help = "any other parameter of notebooks/train.ipynb, for all runs; repeat it for more"
    option("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help=other_help)
    jobs_help = (
        "runs side by side, for GPUs with memory to spare; on two GPUs every other run takes them the other way round. "
        "-p gpu_memory_utilization must leave room for the policies beside the engines; on a CPU nothing is gained "
        "(default: 1)"
    )
    option("--jobs", default=1, type=int, metavar="N", help=jobs_help)
    option("--report-only", action="store_true", help="run nothing, make the report again")
    arguments = parser.parse_args(words)
    arguments.p = [(name, read_value(value, value)) for name, value in arguments.p]
    arguments.runs_dir = (PROJECT_ROOT / arguments.runs_dir).resolve()
    arguments.train = TRAIN_NOTEBOOK
    return arguments


def main(words: list[str] | None = None) -> int:
    arguments = read_arguments(words)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, stop)
    outcome, page, mistake = Outcome(), None, None
    try:
        if not arguments.report_only:
            outcome = run_study(arguments)
        page = make_report(arguments.runs_dir, again=arguments.report_only)
    except UserError as error:
        mistake = error
    except Stopped as stopped:
        print(f"\nStopped ({stopped}). Nothing runs on; the same command continues.", file=sys.stderr)
        return 130
    for name, reason in outcome.failed.items():
        print(f"{name} failed: {reason}")
    if mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    print(f"Report: {shorten_path(str(page))} (as a notebook: {shorten_path(str(page.with_suffix('.ipynb')))})")
    return 1 if outcome.failed else 0


def stop(number, _frame):
    """Stop once; what follows while the running notebooks are shut down is not heard."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)
