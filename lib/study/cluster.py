"""A Ray cluster as the place where a study's runs are made: one run is one task (`node.py`).

The project's code travels along, and so do data and a model inside the project where they are small; others must be at
the same path on each node.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lib.files import PROJECT_ROOT, UserError, absolute, shorten_path
from lib.logs import captured
from lib.study.execution import GRACE, one_line
from lib.study.node import (
    MARKER,
    RETRIES,
    Board,
    Work,
    code_digest,
    execute_run,
    find_missing,
    inside,
    label,
    pack,
    unpack,
)
from lib.study.plan import FOLDERS, PlannedRun
from lib.study.progress import Job, Position

PATIENCE = 60  # seconds for nodes to say what they lack
SHIPPED = 200 << 20  # bytes of data or of a model inside the project that are sent along
PASSED = ("WANDB_", "HF_", "VLLM_")  # beginnings of the user's environment variables that a node does not set itself


class Task:
    """A run handed to the cluster, with the methods of an `Execution` that a study calls."""

    def __init__(self, cluster: "Cluster", run: PlannedRun):
        self.cluster, self.run, self.reference = cluster, run, None

    def start(self) -> None:
        work = self.cluster.work
        options = {"num_gpus": work.gpus, "num_cpus": work.cpus, "max_retries": RETRIES, "name": self.run.name}
        given = work, self.run, self.cluster.board, self.cluster.bases()
        self.reference = execute_run.options(**options).remote(*given)

    def is_running(self) -> bool:
        return not ray.wait([self.reference], timeout=0)[0]

    def result(self) -> str | None:
        """None, or why it failed in one line; what it made is in the study's folder then."""
        try:
            reason, archive = ray.get(self.reference)
        except ray.exceptions.RayError as error:
            return one_line(f"{type(error).__name__}: {error}")
        if archive is not None:
            unpack(archive, self.cluster.folder)
            for ending in (".failed.ipynb", ".log") if reason is None else ():
                (self.cluster.folder / f"{self.run.name}{ending}").unlink(missing_ok=True)
        return reason


class Cluster:
    """Has the methods of `runs.ThisMachine`.

    `address`: HOST:PORT of a cluster's head, 'auto' for the one that this machine belongs to, or 'local', which starts
    one of this machine alone. `gpus`, `cpus`: of a run (see `share_of_a_run`). `settings`: what the runs share,
    resolved. UserError where the cluster can't be used.
    """

    at_once = 1 << 20  # Ray keeps the tasks that have to wait
    longest_first = True

    def __init__(self, address: str, folder: Path, settings: dict, gpus: int | None = None, cpus: int | None = None):
        self.address, self.folder, self.positions, self.heard = address, folder, {}, 0.0
        self.packed: tuple[set[Path], object] = (set(), None)  # bases, and the reference of their archive
        connect(address, folder, settings)
        try:
            nodes = [node for node in ray.nodes() if node["Alive"]]
            gpus, cpus = share_of_a_run([node["Resources"] for node in nodes], gpus, cpus)
            paths = {name: str(inside(path, PROJECT_ROOT)) for name, path in named_files(settings).items()}
            passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
            token, code = uuid.uuid4().hex, code_digest(PROJECT_ROOT)
            self.work = Work(token, folder, PROJECT_ROOT, code, paths, gpus, cpus, passed)
            (folder / MARKER).write_text(token)
            refuse_nodes([node for node in nodes if fits(node["Resources"], gpus, cpus)], self.work)
            self.board = Board.options(scheduling_strategy=on_node(ray.get_runtime_context().get_node_id())).remote()
        except BaseException:
            self.close()
            raise

    def prepare(self, run: PlannedRun, busy: list[PlannedRun]) -> Task:
        return Task(self, run)

    def position(self, job: Job) -> Position:
        """Where a run is, as its task said last; without a node as long as it waits for one."""
        if time.monotonic() - self.heard > 1:
            self.heard = time.monotonic()
            with contextlib.suppress(ray.exceptions.RayError):  # a slow answer costs a line of progress
                self.positions, bases = ray.get(self.board.read.remote(), timeout=5)
                for base in bases:
                    unpack(base, self.folder)
        return self.positions.get(job.run.name, Position(None, 0, 0))

    def bases(self):
        """The measured bases of the study's folder as an archive in Ray's object store, or None; packed once."""
        found = {path.parent for path in self.folder.glob("base-*/settings.json")}
        if found != self.packed[0]:
            self.packed = found, ray.put(pack(self.folder, sorted(path.name for path in found)))
        return self.packed[1]

    def end(self, tasks: list[Task]) -> None:
        """Stop what runs: each task is interrupted and ends its notebook; a worker that does not is killed."""
        references = [task.reference for task in tasks if task.reference is not None]
        for reference in references:
            ray.cancel(reference)
        for reference in ray.wait(references, num_returns=len(references), timeout=GRACE + 10)[1] if references else []:
            ray.cancel(reference, force=True)

    def close(self) -> None:
        (self.folder / MARKER).unlink(missing_ok=True)
        ray.shutdown()


def on_node(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def refuse_nodes(nodes: list[dict], work: Work) -> None:
    """UserError naming each node that lacks a file of the runs."""
    asked = [find_missing.options(scheduling_strategy=on_node(node["NodeID"])).remote(work) for node in nodes]
    try:
        answers = ray.get(asked, timeout=PATIENCE)
    except ray.exceptions.RayError as error:
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
        gpus = 0 if cpus else min(2, int(max(node.get("GPU", 0) for node in nodes)))
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
    # Ray's workers are nice to others (15), and so would be their runs: not on a cluster of this study alone. Nor are
    # workers of use that start before they know the project.
    system = {"worker_niceness": 0, "enable_worker_prestart": False, "prestart_worker_first_driver": False}
    own = {"include_dashboard": False, "_system_config": system}
    options = own if address == "local" else {}
    if address not in ("local", "auto"):
        check_head(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with tempfile.TemporaryDirectory() as place, captured(log):
            options["runtime_env"] = {"working_dir": str(pack_project(Path(place) / "project.zip", settings))}
            ray.init(address, log_to_driver=False, configure_logging=False, namespace=uuid.uuid4().hex, **options)
    except (RuntimeError, ConnectionError, ValueError, OSError, ray.exceptions.RayError) as error:
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
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        healthy = subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        healthy = False
    if not healthy:
        raise UserError(f"--ray {address}: no head of a Ray cluster answers there (`ray start --head` starts one)")


def pack_project(path: Path, settings: dict) -> Path:
    """A zip file of the project's code, and of data and a model where they are inside the project and small."""
    folders = [PROJECT_ROOT / "lib", PROJECT_ROOT / "notebooks"]
    for found in named_files(settings).values():
        size = sum(file.stat().st_size for file in files_of(found))
        if found.is_relative_to(PROJECT_ROOT) and not found.is_relative_to(folders[0]) and size <= SHIPPED:
            folders.append(found)
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(file for folder in folders for file in files_of(folder)):
            archive.write(file, file.relative_to(PROJECT_ROOT))
    return path


def files_of(path: Path) -> list[Path]:
    """A file itself, or the files of a folder but for compiled Python."""
    found = path.rglob("*") if path.is_dir() else [path]
    return [file for file in found if file.is_file() and "__pycache__" not in file.parts]


def named_files(settings: dict) -> dict[str, Path]:
    """The settings that name a file or a folder; a model of the hub names none."""
    paths = {name: absolute(settings[name]) for name in FOLDERS if settings.get(name)}
    return {name: path for name, path in paths.items() if path.exists()}
