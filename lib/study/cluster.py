"""The runs of a study on a Ray cluster: one run is one task, which executes its notebook in a process of its own.

A task sees only the GPUs that Ray gives it. What it made comes back as one archive, and is put in place whole; where
the study's folder can be seen on its node, the run is made in it, as without Ray. Code and small data inside the
project travel along; a model or data elsewhere must be at the same path on each node.
"""

import contextlib
import hashlib
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
import zipfile
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lib.files import PROJECT_ROOT, UserError, absolute, shorten_path
from lib.logs import captured
from lib.run.lock import hold, release
from lib.study.execution import GRACE, POLL, Execution, end, is_alive, one_line, sweep
from lib.study.plan import FOLDERS, PlannedRun
from lib.study.progress import Job, Position

MARKER = ".cluster"  # in the study's folder: a node that reads the study's token there shares the folder
SCRATCH = "sft-study-"
RETRIES = 3  # of a run whose node or worker process died
PATIENCE = 60  # seconds for what a dead worker left to end, and for nodes to answer
SHIPPED = 200 << 20  # bytes of data or of a model inside the project that are sent along
PASSED = ("WANDB_", "HF_", "VLLM_")  # beginnings of the user's environment variables that a node does not set itself


@dataclass(frozen=True)
class Work:
    """What a task needs to know of its study: the same for all of its runs."""

    token: str
    folder: Path  # the study's, as the user's machine sees it; so is the project
    project: Path
    code: str  # digest of the project's code
    paths: dict  # parameters that name a file or folder: inside the project relative to it
    gpus: int
    cpus: int
    environment: dict


# --- On a node -------------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=0)
class Board:
    """Where the runs are, said by the tasks and read by the study; and untrained bases that were measured meanwhile."""

    def __init__(self):
        self.positions: dict[str, Position] = {}
        self.attempts: dict[str, int] = {}
        self.bases: dict[str, bytes] = {}

    def begin(self, run: str, node: str) -> int:
        self.positions[run] = Position(node, 0, 0)
        self.attempts[run] = self.attempts.get(run, 0) + 1
        return self.attempts[run]

    def say(self, run: str, position: Position) -> None:
        self.positions[run] = position

    def add_base(self, archive: bytes) -> None:
        self.bases[hashlib.sha256(archive).hexdigest()] = archive

    def read(self) -> tuple[dict[str, Position], list[bytes]]:
        bases, self.bases = list(self.bases.values()), {}
        return self.positions, bases


@ray.remote
def execute_run(work: Work, run: PlannedRun, board, bases: bytes | None) -> tuple[str | None, bytes | None]:
    """Execute a run's notebook on this node; why it failed or None, and what it made where the folder is not shared."""
    node = node_name()
    attempt = 1
    with contextlib.suppress(ray.exceptions.RayError):  # a study without its board is a study without progress
        attempt = ray.get(board.begin.remote(run.name, node))
    if attempt > RETRIES + 1:
        return f"its worker died {RETRIES + 1} times, the last on {node}: is there too little memory?", None
    sweep(work.folder)
    remove_left_scratch()
    project, shared = project_here(work), is_shared(work)
    folder = work.folder if shared else Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-"))
    try:
        if shared:
            wait_for(folder / run.name)
        elif bases:
            unpack(bases, folder)
        elsewhere = {} if shared and project == work.project else work.paths | {"runs_dir": str(folder)}
        files = (project / inside(run.notebook, work.project), folder / f"{run.name}.ipynb")
        execution = Execution(*files, run.parameters | elsewhere, work.folder, environment(work), project)
        reason = watch(execution, run, folder, board, node, shared)
        return reason and f"{reason} (on {node})", None if shared else pack_run(run, folder, work)
    finally:
        if not shared:
            shutil.rmtree(folder, ignore_errors=True)


def watch(execution: Execution, run: PlannedRun, folder: Path, board, node: str, shared: bool) -> str | None:
    """Wait for a notebook's end, and say on the board how far it is and that a base is there; why it failed, or None."""
    known, said = set(folder.glob("base-*/settings.json")), None
    try:
        execution.start()
        while execution.is_running():
            if (position := Position(node, *run.steps(folder))) != said:
                board.say.remote(run.name, position)
                said = position
            for base in [] if shared else set(folder.glob("base-*/settings.json")) - known:
                board.add_base.remote(pack(folder, [base.parent.name]))
                known.add(base)
            time.sleep(POLL)
        return execution.result()
    finally:
        end([execution])


def node_name() -> str:
    """What the user calls this node: the name given to `ray start --node-name`, or its host's."""
    own = ray.get_runtime_context().get_node_id()
    return label(next(node for node in ray.nodes() if node["NodeID"] == own))


def label(node: dict) -> str:
    return node["NodeManagerHostname"] if node["NodeName"] == node["NodeManagerAddress"] else node["NodeName"]


def is_shared(work: Work) -> bool:
    with contextlib.suppress(OSError):
        return (work.folder / MARKER).read_text() == work.token
    return False


def wait_for(run_dir: Path) -> None:
    """Wait until nobody is at work in a run's folder: the kernel of a worker that died may need a moment to notice."""
    deadline = time.monotonic() + PATIENCE
    while run_dir.is_dir():
        try:
            hold(run_dir, "run_name:")
            return release(run_dir)
        except UserError:
            if time.monotonic() > deadline:
                return  # the notebook will say who it is
            time.sleep(1)


def remove_left_scratch() -> None:
    """Remove what tasks of killed workers left in the node's temporary folder."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        if not is_alive(int(left.name.split("-")[2])):
            shutil.rmtree(left, ignore_errors=True)


def project_here(work: Work) -> Path:
    """The user's project where this node sees the same code at the same place, otherwise the copy sent along."""
    return work.project if code_digest(work.project) == work.code else Path.cwd()


def inside(path: Path, project: Path) -> Path:
    """A path inside the project relative to it; another one as it is."""
    return path.relative_to(project) if path.is_relative_to(project) else path


def environment(work: Work) -> dict:
    """Of a notebook's process: what the node has, what the user set, and the cores and GPUs of its task."""
    own = {**work.environment, **os.environ, "OMP_NUM_THREADS": str(work.cpus)}
    return own | ({} if work.gpus else {"CUDA_VISIBLE_DEVICES": ""})


@ray.remote(num_cpus=0)
def find_missing(work: Work) -> list[str]:
    """Parameters whose files this node lacks, in words."""
    paths = {name: project_here(work) / path for name, path in work.paths.items()}
    return [f"{name}={shorten_path(path)!r} is not there" for name, path in paths.items() if not path.exists()]


# --- Archives --------------------------------------------------------------------------------------------------------


def pack(folder: Path, names: list[str], leave_out: tuple[str, ...] = ()) -> bytes:
    """A tar archive of these files and folders in `folder`."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in names:
            if (folder / name).exists():
                archive.add(
                    folder / name, name, filter=lambda entry: None if Path(entry.name).name in leave_out else entry
                )
    return content.getvalue()


def pack_run(run: PlannedRun, folder: Path, work: Work) -> bytes:
    """A run's folder and notebook with the study's folder in place of the scratch folder wherever that is named."""
    names = [run.name, f"{run.name}.ipynb", f"{run.name}.failed.ipynb", f"{run.name}.log"]
    shown = shorten_path(work.folder)
    texts = [path for name in names[1:] for path in folder.glob(name)] + list((folder / run.name).glob("*.json"))
    for path in texts:
        path.write_text(path.read_text(encoding="utf-8").replace(str(folder), shown), encoding="utf-8")
    kept = () if run.parameters.get("keep_checkpoint") else ("checkpoints",)
    return pack(folder, [*names, *(base.name for base in folder.glob("base-*"))], leave_out=kept)


def unpack(content: bytes, folder: Path) -> list[str]:
    """Put what an archive holds into `folder`, each entry whole; entries in its order, so that a run comes last."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as name:
        incoming = Path(name)
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(incoming, filter="data")
        found = sorted(incoming.iterdir(), key=lambda path: path.is_dir())
        for path in found:
            target = folder / path.name
            if target.is_dir():
                if path.name.startswith("base-"):
                    continue  # measured already
                target.rename(incoming / f".old-{path.name}")
            path.rename(target)
        return [path.name for path in found]


# --- The study's side ------------------------------------------------------------------------------------------------


class Task:
    """A run handed to the cluster, with the methods of an `Execution` that a study calls."""

    def __init__(self, cluster: "Cluster", run: PlannedRun):
        self.cluster, self.run, self.reference = cluster, run, None

    def start(self) -> None:
        work, bases = self.cluster.work, self.cluster.bases()
        options = {"num_gpus": work.gpus, "num_cpus": work.cpus, "max_retries": RETRIES, "name": self.run.name}
        self.reference = execute_run.options(**options).remote(work, self.run, self.cluster.board, bases)

    def is_running(self) -> bool:
        return not ray.wait([self.reference], timeout=0)[0]

    def result(self) -> str | None:
        try:
            reason, archive = ray.get(self.reference)
        except ray.exceptions.RayError as error:
            return one_line(f"{type(error).__name__}: {error}")
        if archive is not None:
            unpack(archive, self.cluster.folder)
            if reason is None:
                for stale in (f"{self.run.name}.failed.ipynb", f"{self.run.name}.log"):
                    (self.cluster.folder / stale).unlink(missing_ok=True)
        return reason


class Cluster:
    """A Ray cluster as the place where a study's runs are made (see `runs.ThisMachine`).

    `address`: HOST:PORT of a cluster's head, 'auto' for the one that this machine belongs to, or 'local', which starts
    one of this machine alone. `gpus`, `cpus`: of a run; None: two GPUs where a node has them, otherwise one, otherwise
    the cores of the smallest node. Raises UserError where the cluster can't be used.
    """

    at_once = 1 << 20  # Ray keeps the tasks that have to wait

    def __init__(self, address: str, folder: Path, settings: dict, gpus: int | None = None, cpus: int | None = None):
        self.folder, self.address, self.positions, self.heard = folder, address, {}, 0.0
        self.packed: tuple[set[Path], object] = (set(), None)
        connect(address, folder, settings)
        try:
            nodes = [node for node in ray.nodes() if node["Alive"]]
            gpus, cpus = share_of_a_run([node["Resources"] for node in nodes], gpus, cpus)
            passed = {k: v for k, v in os.environ.items() if k.startswith(PASSED)}
            paths = {name: str(inside(path, PROJECT_ROOT)) for name, path in named_files(settings).items()}
            token, code = uuid.uuid4().hex, code_digest(PROJECT_ROOT)
            self.work = Work(token, folder, PROJECT_ROOT, code, paths, gpus, cpus, passed)
            (folder / MARKER).write_text(self.work.token)
            able = [n for n in nodes if n["Resources"].get("GPU", 0) >= gpus and n["Resources"].get("CPU", 0) >= cpus]
            self.refuse_nodes(able)
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            self.board = Board.options(scheduling_strategy=here).remote()
        except BaseException:
            self.close()
            raise

    def refuse_nodes(self, nodes: list[dict]) -> None:
        """UserError naming each node that lacks a file of the runs."""
        asked = {
            node["NodeID"]: find_missing.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(self.work)
            for node in nodes
        }
        try:
            answers = ray.get(list(asked.values()), timeout=PATIENCE)
        except ray.exceptions.RayError as error:
            raise UserError(f"--ray {self.address}: a node does not answer: {one_line(str(error))}") from error
        missing = [f"{label(node)}: {'; '.join(found)}" for node, found in zip(nodes, answers, strict=True) if found]
        if missing:
            raise UserError(
                "nodes of the cluster lack files (give them the same path there):\n  " + "\n  ".join(missing)
            )

    def prepare(self, run: PlannedRun, busy: list[PlannedRun]) -> Task:
        return Task(self, run)

    def position(self, job: Job) -> Position:
        """Where a run is, as its task said last; None as node until it has one."""
        if time.monotonic() - self.heard > 1:
            self.heard = time.monotonic()
            with contextlib.suppress(ray.exceptions.RayError):  # a slow answer costs a line of progress
                self.positions, bases = ray.get(self.board.read.remote(), timeout=5)
                for base in bases:
                    unpack(base, self.folder)
        return self.positions.get(job.run.name, Position(None, 0, 0))

    def bases(self):
        """The measured bases of the study's folder in Ray's object store, or None; packed once."""
        found = {path.parent for path in self.folder.glob("base-*/settings.json")}
        if found != self.packed[0]:
            self.packed = found, ray.put(pack(self.folder, sorted(path.name for path in found)))
        return self.packed[1]

    def end(self, tasks: list[Task]) -> None:
        """Stop what runs: each task is interrupted and ends its notebook; a worker that does not is killed."""
        references = [task.reference for task in tasks if task.reference is not None]
        for reference in references:
            ray.cancel(reference)
        left = ray.wait(references, num_returns=len(references), timeout=GRACE + 10)[1] if references else []
        for reference in left:
            ray.cancel(reference, force=True)

    def close(self) -> None:
        (self.folder / MARKER).unlink(missing_ok=True)
        ray.shutdown()


def connect(address: str, folder: Path, settings: dict) -> None:
    """Start or reach the cluster; what Ray says goes to ray.log in the study's folder."""
    log, logger = folder / "ray.log", logging.getLogger("ray")
    logger.handlers = []
    options = {"include_dashboard": False} if address == "local" else {}
    if address not in ("local", "auto"):
        check_head(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with tempfile.TemporaryDirectory() as place, captured(log):
            code = {"working_dir": str(pack_project(Path(place) / "project.zip", settings))}
            ray.init(
                address,
                runtime_env=code,
                log_to_driver=False,
                configure_logging=False,
                namespace=uuid.uuid4().hex,
                **options,
            )
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
        raise UserError(
            f"--ray {address}: must be HOST:PORT of the cluster's head, 'auto', or nothing for this machine"
        )
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        healthy = subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        healthy = False
    if not healthy:
        raise UserError(f"--ray {address}: no head of a Ray cluster answers there (`ray start --head` starts one)")


def pack_project(path: Path, settings: dict) -> Path:
    """A zip file of the project's code, and of the data and model where they are small and inside the project."""
    folders = [PROJECT_ROOT / "lib", PROJECT_ROOT / "notebooks"]
    for found in named_files(settings).values():
        if found.is_relative_to(PROJECT_ROOT) and not found.is_relative_to(folders[0]) and size_of(found) <= SHIPPED:
            folders.append(found)
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(file for folder in folders for file in files_of(folder)):
            archive.write(file, file.relative_to(PROJECT_ROOT))
    return path


def files_of(path: Path) -> list[Path]:
    """A file itself, or the files of a folder but for compiled Python."""
    found = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return [file for file in found if "__pycache__" not in file.parts]


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in files_of(path))


def code_digest(project: Path) -> str:
    """SHA-256 over the code of a project."""
    digest = hashlib.sha256()
    for path in sorted([*project.glob("lib/**/*.py"), *project.glob("notebooks/*.ipynb")]):
        digest.update(f"{path.relative_to(project)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def named_files(settings: dict) -> dict[str, Path]:
    """The settings that name a file or a folder; a model of the hub names none."""
    paths = {name: absolute(settings[name]) for name in FOLDERS if settings.get(name)}
    return {name: path for name, path in paths.items() if path.exists()}


def share_of_a_run(nodes: list[dict], gpus: int | None, cpus: int | None) -> tuple[int, int]:
    """GPUs and cores of a run, from the resources of each node; UserError where no node has so many."""
    if gpus is None:
        gpus = 0 if cpus else min(2, int(max(node.get("GPU", 0) for node in nodes)))
    fitting = [node for node in nodes if node.get("GPU", 0) >= max(gpus, 0) and node.get("CPU", 0) >= (cpus or 1)]
    if not fitting:
        wanted = f"{gpus} GPUs" if gpus else f"{cpus or 1} cores"
        raise UserError(f"--ray: no node of the cluster has {wanted} for a run")
    if cpus is None:
        cpus = min(int(node["CPU"] * gpus // node["GPU"]) or 1 if gpus else int(node["CPU"]) for node in fitting)
    return gpus, cpus
