"""Runs a study: one executed notebook a training set, then the report.

Each run is `papermill notebooks/train.ipynb <runs_dir>/<run>.ipynb` in a process of its own, one after another, or
several side by side (--jobs).
Finished runs are kept, so a stopped study goes on where it stopped: call it again with the same arguments.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from lib.files import UserError, absolute, shorten_path
from lib.run.lock import hold, release
from lib.settings import PROFILES, SEEDS
from lib.study import plan
from lib.study.choice import CHOSEN, gather, plan_tuning, read_choice
from lib.study.execution import notebook_parameters, read_value, sweep
from lib.study.page import make_report
from lib.study.runs import Outcome, ThisMachine, engine_share, find_places, run_all

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """The study was told to stop by a signal. No Exception, so that nothing on the way takes it for a failed run."""


# --- The study -----------------------------------------------------------------------------------------------------


def run_study(arguments: argparse.Namespace) -> Outcome:
    """Plan, refuse what can't work, make what is missing."""
    folder, defaults = arguments.runs_dir, notebook_parameters(plan.TRAIN_NOTEBOOK)
    shared = {"profile": arguments.profile, **dict(arguments.p)}
    check_arguments(arguments, shared, defaults)
    hold(folder, "--runs-dir")
    machine = None
    try:
        if left := sweep(folder):
            print(f"Ended {left} processes that a killed study had left behind.")
        settings = plan.settle(shared, defaults)
        shared = plan.as_settled(shared, settings)
        machine = open_machine(arguments, shared, settings)
        if arguments.tune:
            taken, failed = tune(machine, shared, settings)
            if failed:
                return Outcome(failed=failed)
            shared, settings = shared | taken, settings | taken
        runs = plan_runs(arguments, shared, settings)
        plan.refuse_conflicts(runs, folder, settings)
        return run_all(runs, folder, machine)
    finally:
        if machine is not None:
            machine.close()
        release(folder)


def check_arguments(arguments: argparse.Namespace, shared: dict, defaults: dict) -> None:
    """UserError for arguments that can't be meant, before anything is read."""
    plan.check_names(shared, defaults)
    for size in arguments.sizes:
        plan.read_size(size, {"correct": 1})
    if wrong := [seed for seed in arguments.seeds if not 0 <= seed < SEEDS]:
        raise UserError(f"--seeds {wrong[0]}: must be at least 0 and below {SEEDS}")
    for name in ("jobs", "cpus_per_run"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if arguments.ray is None:
        if arguments.gpus_per_run is not None or arguments.cpus_per_run is not None:
            raise UserError("--gpus-per-run and --cpus-per-run: only with --ray")
        return
    if arguments.jobs > 1:
        raise UserError(f"--jobs {arguments.jobs}: with --ray as many runs are at work as the cluster holds")
    if placed := {"train_device", "eval_device"} & set(shared):
        raise UserError(f"-p {min(placed)}: with --ray each run sees its own GPUs only; use --gpus-per-run")


def open_machine(arguments: argparse.Namespace, shared: dict, settings: dict):
    """Where the runs are made: this machine, or a Ray cluster."""
    if arguments.ray is None:
        places = find_places(settings, arguments.jobs, set(shared))
        if share := engine_share(settings, arguments.jobs, len(places)):
            places = tuple(place | {"gpu_memory_utilization": share} for place in places)
        return ThisMachine(arguments.runs_dir, arguments.jobs, places)
    try:
        from lib.study.cluster import Cluster
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UserError("--ray: Ray is not installed here; `pip install -e '.[cluster]'` brings it") from None
    cluster = Cluster(arguments.ray, arguments.runs_dir, settings, arguments.gpus_per_run, arguments.cpus_per_run)
    if arguments.profile == "auto" and cluster.work.gpus and settings["train_device"] == "cpu":
        cluster.close()
        raise UserError("--profile auto: the cluster has GPUs and this machine has none; say math or mini")
    return cluster


def plan_runs(arguments: argparse.Namespace, shared: dict, settings: dict) -> list[plan.PlannedRun]:
    counted = arguments.match == "steps" or "control" in arguments.sizes
    counts = plan.count_examples(settings) if counted else None
    runs = plan.plan(arguments.runs_dir, arguments.sizes, arguments.seeds, shared, counts)
    return plan.match_steps(runs, settings, counts) if arguments.match == "steps" else runs


def tune(machine, shared: dict, settings: dict) -> tuple[dict, dict[str, str]]:
    """What the runs take from the tuning, made first if it is not there; and why it failed, if it did."""
    open_ones = [name for name in CHOSEN if shared.get(name) is None]
    if not open_ones:
        print("--tune: learning_rate and batch_size are given, so there is nothing to choose.")
        return {}, {}
    folder = machine.folder
    tuning = plan_tuning(folder, shared, settings)
    if not tuning.is_finished(folder):
        points = tuning.points(folder) if machine.at_once > 1 else []
        failed = run_all(points, folder, machine).failed
        gather(tuning, points, folder)
        failed = failed or run_all([tuning], folder, ThisMachine(folder)).failed
        if failed:
            return {}, failed
    chosen = read_choice(folder / tuning.name, settings)
    taken = {name: chosen[name] for name in open_ones}
    words = ", ".join(f"{name} {value:g}" for name, value in taken.items())
    print(f"From {shorten_path(folder)}/tuning/choice.json: {words}. Chosen for: {chosen['why']}.")
    return taken, {}


# --- Command line --------------------------------------------------------------------------------------------------


def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lib.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m lib.study                                            everything, wherever it runs, and the report
  python -m lib.study --profile mini --sizes 128 all             two runs
  python -m lib.study --runs-dir runs/math --profile math -p data_dir /data/a5-alignment/MATH --tune
  python -m lib.study --runs-dir runs/equal-steps --match steps  each size trained for equally many steps
  python -m lib.study --ray                                      on all GPUs of this machine, or its cores
  python -m lib.study --report-only                              the report on what is there

Stop it with Ctrl-C; the same command goes on where it stopped. Exit status: 0 all runs finished, 1 a run failed,
2 a mistake in the arguments, 130 stopped.""",
    )
    option = parser.add_argument
    profile_help = "auto: math where a GPU and the course's data are, otherwise mini (default: auto)"
    option("--profile", default="auto", choices=("auto", *PROFILES), help=profile_help)
    option("--runs-dir", default="runs", help="folder of the study (default: runs)")
    sizes_help = "numbers of examples, all, filtered (the correct ones), control (as many of all); default: the six"
    option("--sizes", nargs="+", default=plan.SIZES, metavar="SIZE", help=sizes_help)
    option("--seeds", nargs="+", default=[0], type=int, metavar="SEED", help="a set of runs for each (default: 0)")
    tune_help = "tune first, once, and take learning_rate and batch_size from it where no -p says them"
    option("--tune", action="store_true", help=tune_help)
    match_help = "what all sizes share; with steps, each takes as many as the full set does (default: epochs)"
    option("--match", default="epochs", choices=("epochs", "steps"), help=match_help)
    other_help = "any other parameter of notebooks/train.ipynb, for all runs; repeat it for more"
    option("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help=other_help)
    jobs_help = "runs side by side; on two GPUs every other run takes them the other way round (default: 1)"
    option("--jobs", default=1, type=int, metavar="N", help=jobs_help)
    ray_help = "make the runs on a Ray cluster: this machine by itself, or the one whose head is at HOST:PORT, or auto"
    option("--ray", nargs="?", const="local", metavar="ADDRESS", help=ray_help)
    gpus_help = "GPUs of a run on a cluster: policy and engine can share one (default: what the nodes have, up to 2)"
    option("--gpus-per-run", type=int, choices=(0, 1, 2), help=gpus_help)
    cpus_help = "cores of a run on a cluster (default: a node's, or its share)"
    option("--cpus-per-run", type=int, metavar="N", help=cpus_help)
    option("--report-only", action="store_true", help="run nothing, make the report again")
    arguments = parser.parse_args(words)
    arguments.p = [(name, read_value(value, value)) for name, value in arguments.p]
    return arguments


def main(words: list[str] | None = None) -> int:
    arguments = read_arguments(words)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, stop)
    outcome, page, mistake = Outcome(), None, None
    try:
        arguments.runs_dir = read_folder(arguments.runs_dir)
        if not arguments.report_only:
            outcome = run_study(arguments)
        page = make_report(arguments.runs_dir)
    except UserError as error:
        mistake = error
    except OSError as error:  # a full disk, a folder that can't be written
        mistake = f"{error.strerror or error}: {shorten_path(error.filename or arguments.runs_dir)}"
    except Stopped as stopped:
        print(f"\nStopped ({stopped}). Nothing runs on; the same command continues.", file=sys.stderr)
        return 130
    for name, reason in outcome.failed.items():
        print(f"{name} failed: {reason}")
    if mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 1 if outcome.failed else 2
    print(f"Report: {shorten_path(page)} (as a notebook: {shorten_path(page.with_suffix('.ipynb'))})")
    return 1 if outcome.failed else 0


def leave(code: int) -> None:
    """End the process. Ray is closed by then, but its threads were once seen to hold up the exit for a minute."""
    if "ray" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def read_folder(text: str) -> Path:
    if not text.strip():
        raise UserError("--runs-dir: must name a folder")
    return absolute(text)


def stop(number, _frame):
    """Stop once; what follows while the running notebooks are shut down is not heard."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)
