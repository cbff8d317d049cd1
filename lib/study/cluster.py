"""A Ray cluster as the place where a study's runs are made: one run is one task (`node.py`).

The project's code travels along, and so do data and a model inside the project where they are small; others must be at
the same path on each node.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import ray
from ray import exceptions
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lib.environment import COMMIT, git_state
from lib.files import PROJECT_ROOT, UserError, absolute, shorten_path
from lib.logs import captured
from lib.study.execution import GRACE, POLL, one_line
from lib.study.node import MARKER, Work, code_digest, execute_run, find_missing, inside, label, pack, unpack
from lib.study.plan import FOLDERS, PlannedRun
from lib.study.progress import Job, Position

PATIENCE = 60  # seconds for nodes to say what they lack
SHIPPED = 200 << 20  # bytes of data or of a model inside the project that are sent along
PASSED = ("WANDB_", "HF_", "VLLM_")  # beginnings of the user's environment variables that a node does not set itself
ATTEMPTS = 4  # to make a run whose node or worker process died
# Ray's workers are nice to others (15), and so would be their runs: not on a cluster of this study alone. Workers that
# start before they know the project are of no use.
ALONE = {"worker_niceness": 0, "enable_worker_prestart": False, "prestart_worker_first_driver": False}
LOST = (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.LocalRayletDiedError)
LOST += (exceptions.OutOfMemoryError, exceptions.ObjectLostError)


class Task:
    """A run handed to the cluster, with the methods of an `Execution` that a study calls."""

    def __init__(self, cluster: "Cluster", run: PlannedRun):
        self.cluster, self.run, self.said = cluster, run, None
        self.attempts, self.reason = 0, None

    def start(self) -> None:
        work = self.cluster.work
        self.attempts += 1
        self.position = Position(None, 0, 0)  # without a node as long as it waits for one
        asked = execute_run.options(num_gpus=work.gpus, num_cpus=work.cpus, name=self.run.name)
        self.said = asked.remote(work, self.run, self.cluster.bases())

    def is_running(self) -> bool:
        """Take what the task has said meanwhile; begin it again where its node or its worker has died."""
        try:
            while ray.wait([self.said], timeout=0)[0]:
                said = ray.get(next(self.said))
                if isinstance(said, Position):
                    self.position = said
                elif isinstance(said, bytes):
                    unpack(said, self.cluster.folder)
                else:
                    self.reason = said
                    return False
        except exceptions.RayError as error:
            self.reason = one_line(f"{type(error).__name__}: {error}")
            if not isinstance(error, LOST):
                return False
            if self.attempts == ATTEMPTS:
                self.reason = f"its worker died {ATTEMPTS} times: is there too little memory? ({self.reason})"
                return False
            logging.getLogger("ray").warning("%s is retried: %s", self.run.name, self.reason)
            self.start()
        return True

    def result(self) -> str | None:
        """None, or why it failed in one line; what it made is in the study's folder then."""
        for ending in (".failed.ipynb", ".log") if self.reason is None else ():
            (self.cluster.folder / f"{self.run.name}{ending}").unlink(missing_ok=True)
        return self.reason


class Cluster:
    """Has the methods of `runs.ThisMachine`.

    `address`: HOST:PORT of a cluster's head, 'auto' for the one that this machine belongs to, or 'local', which starts
    one of this machine alone. `gpus`, `cpus`: of a run (see `share_of_a_run`). `settings`: what the runs share,
    resolved. UserError where the cluster can't be used.
    """

    at_once = 1 << 20  # Ray keeps the tasks that have to wait
    longest_first = True
    base_first = True
    shares_memory = False

    def __init__(self, address: str, folder: Path, settings: dict, gpus: int | None = None, cpus: int | None = None):
        self.folder = folder
        self.packed: tuple[list[Path], object] = ([], None)  # bases, and the reference of their archive
        connect(address, folder, settings)
        try:
            nodes = [node for node in ray.nodes() if node["Alive"]]
            gpus, cpus = share_of_a_run([node["Resources"] for node in nodes], gpus, cpus)
            paths = {name: str(inside(path, PROJECT_ROOT)) for name, path in named_files(settings).items()}
            passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
            passed[COMMIT] = json.dumps(git_state())
            token, code = uuid.uuid4().hex, code_digest(PROJECT_ROOT)
            self.work = Work(token, folder, PROJECT_ROOT, code, paths, gpus, cpus, passed)
            (folder / MARKER).write_text(token)
            refuse_nodes([node for node in nodes if fits(node["Resources"], gpus, cpus)], self.work)
        except BaseException:
            self.close()
            raise

    def prepare(self, run: PlannedRun, busy: list[PlannedRun], alone: bool = False) -> Task:
        return Task(self, run)

    def position(self, job: Job) -> Position:
        return job.execution.position

    def bases(self):
        """The measured bases of the study's folder as an archive in Ray's object store, or None; packed once."""
        found = [path.parent for path in sorted(self.folder.glob("base-*/settings.json"))]
        if found != self.packed[0]:
            self.packed = found, ray.put(pack(self.folder, found))
        return self.packed[1]

    def end(self, tasks: list[Task]) -> None:
        """Stop what runs: each task is interrupted and ends its notebook; a worker that does not is killed."""
        left = [task for task in tasks if task.said is not None]
        for task in left:
            task.attempts = ATTEMPTS  # it is not begun again
            ray.cancel(task.said)
        deadline = time.monotonic() + GRACE + 10
        while (left := [task for task in left if task.is_running()]) and time.monotonic() < deadline:
            time.sleep(POLL)
        for task in left:
            ray.cancel(task.said, force=True)

    def close(self) -> None:
        (self.folder / MARKER).unlink(missing_ok=True)
        ray.shutdown()


def refuse_nodes(nodes: list[dict], work: Work) -> None:
    """UserError naming each node that lacks a file of the runs."""
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    asked = [find_missing.options(scheduling_strategy=place).remote(work) for place in places]
    try:
        answers = ray.get(asked, timeout=PATIENCE)
    except exceptions.RayError as error:
        raise UserError(f"--ray: a node does not answer: {one_line(str(error))}") from error
    missing = [f"\n  {label(node)}: {'; '.join(found)}" for node, found in zip(nodes, answers, strict=True) if found]
    if missing:
        raise UserError(f"nodes of the cluster lack files (give them the same path there):{''.join(sorted(missing))}")


def fits(node: dict, gpus: int, cpus: int) -> bool:
    return node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= cpus


def share_of_a_run(nodes: list[dict], gpus: int | None, cpus: int | None) -> tuple[int, int]:
    """GPUs and cores of a run, from the resources of each node.

    Where they are None: two GPUs if a node has them, one if it has one, and their share of its cores; without GPUs the
    cores of the smallest node. UserError where no node has so many.
    """
    if gpus is None:
        gpus = min(2, int(max(node.get("GPU", 0) for node in nodes)))
    able = [node for node in nodes if fits(node, gpus, cpus or 1)]
    if not able:
        raise UserError(f"--ray: no node of the cluster has {f'{gpus} GPUs and ' if gpus else ''}{cpus or 1} cores")
    shares = [int(node["CPU"] * gpus // node["GPU"]) if gpus else int(node["CPU"]) for node in able]
    return gpus, cpus or max(1, min(shares))


# --- Connecting ------------------------------------------------------------------------------------------------------


def connect(address: str, folder: Path, settings: dict) -> None:
    """Start or reach the cluster, and send the project; what Ray says goes to ray.log in the study's folder."""
    log, logger = folder / "ray.log", logging.getLogger("ray")
    logger.handlers = []
    options = {"include_dashboard": False, "_system_config": ALONE} if address == "local" else {}
    if address not in ("local", "auto"):
        check_head(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with tempfile.TemporaryDirectory() as place, captured(log):
            copy_project(Path(place), settings)
            options["runtime_env"] = {"working_dir": place}
            ray.init(address, log_to_driver=False, configure_logging=False, **options)
    except (RuntimeError, ConnectionError, ValueError, OSError, exceptions.RayError) as error:
        raise UserError(f"--ray {address}: {one_line(str(error))} (see {shorten_path(log)})") from error
    finally:
        logger.handlers = [logging.FileHandler(log)]  # Ray has removed what was there
        # What nodes report (one lost, a run begun again) is printed by a thread of Ray's that knows no other place.
        ray._private.worker.print_to_stdstream = lambda data, **_: logger.warning("\n".join(data["lines"]))
        for number, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(number, handler)


def check_head(address: str) -> None:
    """UserError where no head of a cluster answers: `ray.init` would wait for ever."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise UserError(f"--ray {address}: must be HOST:PORT of the cluster's head, 'auto', or nothing")
    # As `ray start` and `ray.init` do: a cluster that was started where there is a token wants it (~/.ray/auth_token).
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20)
        why = f": {one_line(asked.stderr.strip().splitlines()[-1])}" if asked.returncode else None
    except subprocess.TimeoutExpired:
        why = ""
    if why is not None:
        raise UserError(f"--ray {address}: no head of a Ray cluster answers there (`ray start --head` starts one){why}")


def copy_project(place: Path, settings: dict) -> None:
    """The project's code, and data and a model where they are inside the project and small."""
    for path in (PROJECT_ROOT / "lib", PROJECT_ROOT / "notebooks", *named_files(settings).values()):
        target = place / inside(path, PROJECT_ROOT)
        if target == path or target.exists():  # outside the project, or a part of its code
            continue
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        elif sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) <= SHIPPED:
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))


def named_files(settings: dict) -> dict[str, Path]:
    """The settings that name a file or a folder; a model of the hub names none."""
    paths = {name: absolute(settings[name]) for name in FOLDERS if settings.get(name)}
    return {name: path for name, path in paths.items() if path.exists()}
