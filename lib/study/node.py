"""On a node of a Ray cluster: a task executes a run's notebook in a process of its own, and gives back what it made.

Where the node sees the study's folder, the run is made in it, as without Ray; elsewhere in a scratch folder, which
comes back as one archive. A task sees only the GPUs that Ray gives it.
"""

import contextlib
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import ray

from lib.files import shorten_path
from lib.study.execution import POLL, Execution, end, sweep
from lib.study.plan import PlannedRun
from lib.study.progress import Position

MARKER = ".cluster"  # in the study's folder: a node that reads the study's token there shares the folder
RETRIES = 3  # of a run whose node or worker process died


@dataclass(frozen=True)
class Work:
    """What a task needs to know of its study: the same for all of its runs."""

    token: str
    folder: Path  # the study's, where the user's machine has it; so is the project
    project: Path
    code: str  # digest of the project's code
    paths: dict[str, str]  # parameters that name a file or folder: inside the project relative to it
    gpus: int  # of a run
    cpus: int
    environment: dict[str, str]


@ray.remote(num_cpus=0)
class Board:
    """Where the runs are, said by the tasks and read by the study; and untrained bases that were measured meanwhile."""

    def __init__(self):
        self.positions: dict[str, Position] = {}
        self.attempts: dict[str, int] = {}
        self.bases: list[bytes] = []

    def begin(self, run: str) -> int:
        self.attempts[run] = self.attempts.get(run, 0) + 1
        return self.attempts[run]

    def say(self, run: str, position: Position) -> None:
        self.positions[run] = position

    def add_base(self, archive: bytes) -> None:
        self.bases.append(archive)

    def read(self) -> tuple[dict[str, Position], list[bytes]]:
        bases, self.bases = self.bases, []
        return self.positions, bases


# --- A run -----------------------------------------------------------------------------------------------------------


@ray.remote
def execute_run(work: Work, run: PlannedRun, board, bases: bytes | None) -> tuple[str | None, bytes | None]:
    """Why the run failed, or None; and an archive of what it made, where the study's folder is not shared."""
    node, attempt = node_name(), 1
    with contextlib.suppress(ray.exceptions.RayError):  # without its board a study has no progress, but goes on
        attempt = ray.get(board.begin.remote(run.name))
    if attempt > RETRIES + 1:  # Ray by itself counts neither workers killed for memory nor attempts of both kinds
        return f"its worker died {RETRIES + 1} times: is there too little memory? (on {node})", None
    sweep(work.folder)
    project, shared = project_here(work), is_shared(work)
    folder = work.folder if shared else Path(tempfile.mkdtemp(prefix="scratch-", dir=Path.cwd()))
    try:
        if bases and not shared:
            unpack(bases, folder)
        elsewhere = {} if shared and project == work.project else work.paths | {"runs_dir": str(folder)}
        files = project / inside(run.notebook, work.project), folder / f"{run.name}.ipynb"
        execution = Execution(*files, run.parameters | elsewhere, work.folder, environment(work), project)
        reason = watch(execution, run, folder, board, node, shared)
        return reason and f"{reason} (on {node})", None if shared else pack_run(run, folder, work)
    finally:
        if not shared:
            shutil.rmtree(folder, ignore_errors=True)


def watch(execution: Execution, run: PlannedRun, folder: Path, board, node: str, shared: bool) -> str | None:
    """Wait for a notebook's end and say on the board how far it is, and that a base is there; why it failed or None."""
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


@ray.remote(num_cpus=0)
def find_missing(work: Work) -> list[str]:
    """Parameters whose files this node lacks, in words."""
    paths = {name: project_here(work) / path for name, path in work.paths.items()}
    return [f"{name}={shorten_path(path)!r} is not there" for name, path in paths.items() if not path.exists()]


def node_name() -> str:
    own = ray.get_runtime_context().get_node_id()
    return label(next(node for node in ray.nodes() if node["NodeID"] == own))


def label(node: dict) -> str:
    """What the user calls a node: the name given to `ray start --node-name`, or its host's."""
    return node["NodeManagerHostname"] if node["NodeName"] == node["NodeManagerAddress"] else node["NodeName"]


def is_shared(work: Work) -> bool:
    with contextlib.suppress(OSError):
        return (work.folder / MARKER).read_text() == work.token
    return False


def project_here(work: Work) -> Path:
    """The user's project where this node sees the same code at the same place, otherwise the copy sent along."""
    return work.project if code_digest(work.project) == work.code else Path.cwd()


def code_digest(project: Path) -> str:
    """SHA-256 over the code of a project."""
    digest = hashlib.sha256()
    for path in sorted([*project.glob("lib/**/*.py"), *project.glob("notebooks/*.ipynb")]):
        digest.update(f"{path.relative_to(project)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def inside(path: Path, project: Path) -> Path:
    """A path inside the project relative to it; another one as it is."""
    return path.relative_to(project) if path.is_relative_to(project) else path


def environment(work: Work) -> dict[str, str]:
    """Of a notebook's process: what the node has, what the user set besides, and the cores and GPUs of its task."""
    own = {**work.environment, **os.environ, "OMP_NUM_THREADS": str(work.cpus)}
    return own if work.gpus else own | {"CUDA_VISIBLE_DEVICES": ""}


# --- Archives --------------------------------------------------------------------------------------------------------


def pack(folder: Path, names: list[str], leave_out: str = "") -> bytes:
    """A tar archive of these files and folders in `folder`, as far as they are there."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in names:
            if (folder / name).exists():
                archive.add(
                    folder / name, name, filter=lambda entry: entry if Path(entry.name).name != leave_out else None
                )
    return content.getvalue()


def pack_run(run: PlannedRun, folder: Path, work: Work) -> bytes:
    """A run's folder and notebook, and bases; the scratch folder's name gives way to the study's in all of them."""
    shown = shorten_path(work.folder)
    texts = [path for path in (*folder.glob(f"{run.name}.*"), *(folder / run.name).glob("*.json")) if path.is_file()]
    for path in texts:
        text = path.read_text(encoding="utf-8").replace(str(folder), shown).replace(folder.name, shown)
        path.write_text(text, encoding="utf-8")
    names = [path.name for path in (*folder.glob(f"{run.name}.*"), folder / run.name, *folder.glob("base-*"))]
    return pack(folder, names, "" if run.parameters.get("keep_checkpoint") else "checkpoints")


def unpack(content: bytes, folder: Path) -> None:
    """Put what an archive holds into `folder`, each entry whole, notebooks before the folders of their runs.

    A base that is there already stays.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as name:
        incoming = Path(name)
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(incoming, filter="data")
        for path in sorted(incoming.iterdir(), key=lambda path: path.is_dir()):
            target = folder / path.name
            if path.name.startswith("base-") and target.exists():
                continue
            if target.is_dir():
                target.rename(incoming / f".old-{path.name}")
            path.rename(target)
