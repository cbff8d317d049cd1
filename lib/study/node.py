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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray

from lib.files import shorten_path
from lib.study.execution import POLL, Execution, end, sweep
from lib.study.plan import PlannedRun
from lib.study.progress import Position

MARKER = ".cluster"  # in the study's folder: a node that reads the study's token there shares the folder


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


@ray.remote(max_retries=0)
def execute_run(work: Work, run: PlannedRun, bases: bytes | None) -> Iterator:
    """Make a run. Yields its `Position` whenever it changes, and at last why it failed, or None.

    Where the study's folder is not shared, also archives: of a base once it is measured, and of what the run made.
    """
    sweep(work.folder)
    node, project, shared = node_name(), project_here(work), is_shared(work)
    folder = work.folder if shared else Path(tempfile.mkdtemp(prefix="scratch-", dir=Path.cwd()))
    elsewhere = {} if shared and project == work.project else work.paths | {"runs_dir": str(folder)}
    files = project / inside(run.notebook, work.project), folder / f"{run.name}.ipynb"
    execution = Execution(*files, run.parameters | elsewhere, work.folder, environment(work), project)
    try:
        if bases and not shared:
            unpack(bases, folder)
        known, position = set(folder.glob("base-*/settings.json")), None
        execution.start()
        while execution.is_running():
            if (now := Position(node, *run.steps(folder))) != position:
                yield (position := now)
            measured = set(folder.glob("base-*/settings.json")) - known
            if measured and not shared:
                yield pack(folder, [path.parent for path in measured])
                known |= measured
            time.sleep(POLL)
        reason = execution.result()
        if not shared:
            yield pack_run(run, folder, work)
    finally:
        end([execution])
        if not shared:
            shutil.rmtree(folder, ignore_errors=True)
    yield reason and f"{reason} (on {node})"  # with nothing left behind: the study may end with it


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


def pack(folder: Path, paths: list[Path]) -> bytes:
    """A tar archive of these files and folders in `folder`."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for path in paths:
            archive.add(path, path.relative_to(folder))
    return content.getvalue()


def pack_run(run: PlannedRun, folder: Path, work: Work) -> bytes:
    """A run's folder and notebook, and bases; the scratch folder's name gives way to the study's in all of them."""
    if not run.parameters.get("keep_checkpoint"):
        shutil.rmtree(folder / run.name / "checkpoints", ignore_errors=True)
    shown, beside = shorten_path(work.folder), list(folder.glob(f"{run.name}.*"))
    for path in [*beside, *(folder / run.name).glob("*.json")]:
        text = path.read_text(encoding="utf-8").replace(str(folder), shown).replace(folder.name, shown)
        path.write_text(text, encoding="utf-8")
    return pack(folder, [*beside, *folder.glob(run.name), *folder.glob("base-*")])


def unpack(content: bytes, folder: Path) -> None:
    """Put what an archive holds into `folder`, each entry whole, notebooks before the folders of their runs.

    A base that is there already stays, and so does a run that is finished or has a checkpoint, if the new one failed.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as name:
        incoming = Path(name)
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(incoming, filter="data")
        for path in sorted(incoming.iterdir(), key=lambda path: path.is_dir()):
            target = folder / path.name
            if path.name.startswith("base-") and target.exists():
                continue
            worth = [*target.glob("summary.json"), *target.glob("checkpoints/step-*")]
            if path.is_dir() and worth and not (path / "summary.json").is_file():
                continue
            if target.is_dir():
                target.rename(incoming / f".old-{path.name}")
            path.rename(target)
