"""The study on a Ray cluster of two nodes on this machine: same runs as without, whatever dies. A stub notebook."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import nbformat
import psutil
import pytest
from stub_study import (  # noqa: F401
    alive,
    ended,
    made,
    put_base,
    start_study,
    started,
    stub_notebook,
    stub_tuning_notebook,
    visits,
    wait_for_run,
)

from lib.environment import git_state
from lib.files import PROJECT_ROOT, UserError, read_lines
from lib.study.choice import GRIDS
from lib.study.execution import MARK

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[cluster]'")
from ray._private.authentication.authentication_token_setup import (  # noqa: E402
    maybe_enable_token_auth_if_token_available,
)
from ray.cluster_utils import Cluster as Nodes  # noqa: E402

pytestmark = pytest.mark.cluster

from lib.study import cluster  # noqa: E402
from lib.study.node import pack, unpack  # noqa: E402

EACH = ["--cpus-per-run", "1"]


@pytest.fixture(scope="module")
def nodes():
    """A head and another node, each with room for two runs; like those of `ray start`, they want a token."""
    os.environ["RAY_AUTH_TOKEN"] = "0" * 64
    both = Nodes()
    add_node(both, "head", 2, _system_config=cluster.ALONE)
    add_node(both, "second", 2)
    yield both
    both.shutdown()
    del os.environ["RAY_AUTH_TOKEN"], os.environ["RAY_AUTH_MODE"]


def add_node(nodes: Nodes, name: str, cpus: int, **options):
    """A node with a folder of its own, as on a machine of its own: a node deletes a copy of the code that it finds."""
    maybe_enable_token_auth_if_token_available()  # says it in the environment of this process
    place = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # sockets want a short path
    node = nodes.add_node(num_cpus=cpus, node_name=name, temp_dir=place.name, **options)
    node.place = place
    return node


@pytest.fixture(autouse=True)
def nothing_left(tmp_path):
    yield
    ray.shutdown()
    assert [p for p in psutil.process_iter() if marked(p) == str(tmp_path / "runs")] == [], "a run outlives its study"


def start(stub, *words: str, **options) -> subprocess.Popen:
    """A study in a process of its own, which finds a token and was not told to use it."""
    given = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    return start_study(stub, *words, env=given | options.pop("env", {}), **options)


def marked(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return process.environ().get(MARK, "").rpartition(":")[2]
    return ""


@pytest.fixture
def apart(monkeypatch):
    """Nodes that don't see the study's folder: what a run makes has to travel."""
    monkeypatch.setattr(cluster, "MARKER", ".nobody-looks-here")


# --- The same runs -------------------------------------------------------------------------------------------------


def test_runs_of_a_shared_folder_are_made_in_it(stub, tmp_path, nodes):
    folder = tmp_path / "runs"
    words = ["--sizes", "128", "256", "512", "-p", "base_after", "1", "-p", "meet", "n128 n256 n512"]
    outcome = made(stub, folder, *words, "--ray", nodes.address, *EACH)
    assert (sorted(outcome.finished), outcome.failed) == (["n128", "n256", "n512"], {})
    assert (folder / "base-0123/measured_by").read_text() == "n512\n", "the longest run begins"
    run = folder / "n128"
    assert (seen(run, "OMP_NUM_THREADS"), seen(run, "CUDA_VISIBLE_DEVICES")) == ("1", ""), "those of its task"
    assert seen(run, "cwd") == str(PROJECT_ROOT) == str(Path(seen(run, "lib")).parents[1]), "the same code, where it is"
    assert {name: seen(run, name) for name in ("git_commit", "git_dirty")} == git_state()
    names = ["n128", "n256", "n512"]
    expected = {"base-0123", "ray.log", *names, *(f"{name}.ipynb" for name in names)}
    assert {path.name for path in folder.iterdir()} == expected
    assert made(stub, folder, *words).kept == names, "the same study without Ray"


def test_without_a_shared_folder_each_run_comes_back_whole(stub, tmp_path, nodes, apart):
    """The base is measured by the first run, reaches the user before that run ends, and then the others."""
    folder = tmp_path / "runs"
    words = ["--sizes", "128", "256", "512", "-p", "base_after", "0", "-p", "sleep", "10", "-p", "fail_at", "128"]
    outcome = made(stub, folder, *words, "--ray", nodes.address, *EACH)
    assert (sorted(outcome.finished), list(outcome.failed)) == (["n256", "n512"], ["n128"])
    assert outcome.failed["n128"].startswith("ValueError: loss is nan with n=128 (on ")
    names = [
        "base-0123",
        "n128",
        "n128.failed.ipynb",
        "n128.log",
        "n256",
        "n256.ipynb",
        "n512",
        "n512.ipynb",
        "ray.log",
    ]
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".nobody")) == names
    assert (folder / "base-0123/measured_by").read_text() == "n512\n"
    assert started(folder / "n256") < ended(folder / "n512"), "they were at work at the same time"
    for path in [*folder.glob("*.ipynb"), *folder.glob("*/*.json")]:
        assert "scratch-" not in path.read_text() and "/ray/" not in path.read_text()
    assert f'runs_dir = "{folder}"' in "".join(cell.source for cell in nbformat.read(folder / "n512.ipynb", 4).cells)
    copies = Path(nodes.head_node.get_session_dir_path()) / "runtime_resources/working_dir_files"
    assert list(copies.glob("*/lib")) and not list(copies.glob("*/scratch-*"))

    again = made(stub, folder, *words[:-3], "--ray", nodes.address, *EACH)
    assert (again.kept, again.finished) == (["n512", "n256"], ["n128"])
    assert visits(folder / "n128") == 1, "the failed run was replaced"
    assert sorted(path.name for path in folder.glob("n128*")) == ["n128", "n128.ipynb"]


def test_two_studies_on_one_cluster_do_not_mix(stub, tmp_path, nodes):
    both = [tmp_path / "runs", tmp_path / "others"]
    words = ["--sizes", "128", "--ray", nodes.address, *EACH, "-p", "sleep", "1"]
    studies = [
        start(stub, "--runs-dir", str(folder), *words, "-p", "epochs", epochs, stdout=subprocess.PIPE, text=True)
        for folder, epochs in zip(both, "57", strict=True)
    ]
    said = [study.communicate(timeout=120)[0] for study in studies]
    for folder, epochs, text in zip(both, (5, 7), said, strict=True):
        assert "finished in" in text
        assert json.loads((folder / "n128/config.json").read_text())["parameters"]["epochs"] == epochs
        assert visits(folder / "n128") == 1


def test_other_code_on_the_nodes_is_not_used(stub, tmp_path, nodes, monkeypatch):
    """The nodes have another version of the project at the same place: the user's own travels, with its data."""
    monkeypatch.setattr(cluster, "code_digest", lambda project: "the user's own")
    data = ["-p", "data_dir", "tests/study"]
    folder = tmp_path / "runs"
    outcome = made(stub, folder, "--sizes", "128", *data, "--ray", nodes.address, *EACH)
    assert outcome.finished == ["n128"]
    place = Path(seen(folder / "n128", "cwd"))
    assert seen(folder / "n128", "git_commit") == git_state()["git_commit"], "the copy has no history"
    assert place != PROJECT_ROOT and (place / "lib/study/cluster.py").read_text() == Path(cluster.__file__).read_text()
    assert (place / "tests/study/test_cluster.py").is_file() and not (place / "README.md").exists()

    monkeypatch.setattr(cluster, "SHIPPED", 0)  # too large to be sent
    with pytest.raises(
        UserError, match=r"(?s)nodes of the cluster lack files.*head: data_dir=.*second: data_dir=.*tests/study"
    ):
        made(stub, folder, "--sizes", "256", *data, "--ray", nodes.address, *EACH)
    assert not (folder / "n256").exists()


@pytest.mark.parametrize("where", ["shared", "apart"])
def test_points_of_a_tuning_are_tasks(stub, tmp_path, nodes, stub_tuning, monkeypatch, where):
    if where == "apart":
        monkeypatch.setattr(cluster, "MARKER", ".nobody-looks-here")
    monkeypatch.setitem(GRIDS["mini"], "learning_rates", [0.001, 0.002])
    monkeypatch.setitem(GRIDS["mini"], "batch_sizes", [8])
    folder = tmp_path / "runs"
    outcome = made(stub, folder, "--tune", "--sizes", "128", "--ray", nodes.address, *EACH)
    assert outcome.finished == ["n128"]
    assert json.loads((folder / "n128/config.json").read_text())["parameters"]["learning_rate"] == 0.002
    rows = read_lines(folder / "tuning/tuning.jsonl")
    assert sorted((row["learning_rate"], row["batch_size"]) for row in rows) == [(0.001, 8), (0.002, 8)]
    assert len({row["by"] for row in rows}) == 2, "each in a process of its own"
    assert len(list((folder / "tuning/records").iterdir())) == 2
    assert sorted(path.name for path in folder.glob("tuning*")) == ["tuning", "tuning.ipynb"]


# --- A host with two GPUs ------------------------------------------------------------------------------------------


def test_two_gpus_of_one_host(stub, tmp_path, monkeypatch):
    """Seed 0 without Ray, then the other seeds with it in the same folder: one-GPU runs two at a time, seed by seed,
    and one that has both. The GPUs are not there; Ray deals them out all the same."""
    monkeypatch.setattr(ray, "init", partial(ray.init, num_gpus=2, num_cpus=4))
    folder, mini = tmp_path / "runs", ["--profile", "mini"]
    sizes = [*mini, "--sizes", "128", "256", "-p", "base_after", "0", "-p", "sleep", "1.5"]
    assert made(stub, folder, *sizes).finished == ["n128", "n256"]

    second = made(stub, folder, *sizes, "--seeds", "0", "1", "2", "--ray", "--gpus-per-run", "1")
    names = [f"n{n}-seed{seed}" for seed in (1, 2) for n in (256, 128)]
    assert (sorted(second.kept), sorted(second.finished)) == (["n128", "n256"], sorted(names))
    assert (folder / "base-0123/measured_by").read_text() == "n128\n", "once, without Ray"
    assert {seen(folder / name, "CUDA_VISIBLE_DEVICES") for name in names} == {"0", "1"}
    assert {seen(folder / name, "OMP_NUM_THREADS") for name in names} == {"2"}, "its share of four cores"
    begun = {name: started(folder / name) for name in names}
    at_once = [sum(begun[b] <= begun[a] < ended(folder / b) for b in names) for a in names]
    assert max(at_once) == 2
    assert max(begun[name] for name in names[:2]) < min(begun[name] for name in names[2:]), "seed 1 before seed 2"

    assert made(stub, folder, *mini, "--sizes", "512", "--ray").finished == ["n512"]
    assert seen(folder / "n512", "CUDA_VISIBLE_DEVICES") == "0,1", "both, unless one is asked for"


def seen(run: Path, name: str) -> str:
    """A variable of the environment that a run found."""
    return json.loads((run / "visits.jsonl").read_text())[name]


# --- Faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["shared", "apart"])
def test_a_node_that_dies_in_the_middle_of_a_run(stub, tmp_path, nodes, where):
    """The only node with room dies; the run waits for another one and is made again there."""
    folder = tmp_path / "runs"
    put_base(folder)
    doomed = add_node(nodes, "doomed", 3)
    more = 'from lib.study import cluster; cluster.MARKER = ".nobody-looks-here"' if where == "apart" else ""
    words = ["--runs-dir", str(folder), "--sizes", "128", "--ray", nodes.address, "--cpus-per-run", "3"]
    study = start(stub, *words, "-p", "sleep", "8", more=more, stdout=subprocess.PIPE, text=True)
    kernel = wait_for_kernel(folder)
    nodes.remove_node(doomed, allow_graceful=False)
    spare = add_node(nodes, "spare", 3)
    try:
        said, _ = study.communicate(timeout=120)
    finally:
        study.kill()
        nodes.remove_node(spare)
    assert study.returncode == 0, said
    assert "retried" not in said and "retried" in (folder / "ray.log").read_text()
    assert not alive(kernel)
    assert json.loads((folder / "n128/summary.json").read_text())["status"] == "finished"
    assert visits(folder / "n128") == (2 if where == "shared" else 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_study_leaves_nothing_on_the_nodes_and_goes_on(stub, tmp_path, nodes, number):
    folder = tmp_path / "runs"
    put_base(folder)
    words = ["--runs-dir", str(folder), "--sizes", "128", "256", "512", "--ray", nodes.address, *EACH]
    study = start(stub, *words, "-p", "sleep", "60")
    try:
        pids = wait_for_run(folder / "n512") + wait_for_run(folder / "n256")
        study.send_signal(number)
        assert study.wait(60) == (130 if number == signal.SIGTERM else -9)
    finally:
        study.kill()
    wait_until(lambda: not any(alive(pid) for pid in (pids if number == signal.SIGTERM else pids[::2])))
    outcome = made(stub, folder, *words[2:], "-p", "sleep", "0.1")
    assert (sorted(outcome.finished), outcome.failed) == (["n128", "n256", "n512"], {})
    assert not any(alive(pid) for pid in pids), "also what a killed kernel left"


def test_a_worker_that_is_killed_for_memory_begins_its_run_again(stub, tmp_path, nodes):
    """As Ray does it where memory runs out: the worker's process is killed, and its notebook with it."""
    folder = tmp_path / "runs"
    put_base(folder)
    words = ["--runs-dir", str(folder), "--sizes", "128", "--ray", nodes.address, *EACH, "-p", "sleep", "6"]
    study = start(stub, *words, stdout=subprocess.PIPE, text=True)
    kernel = wait_for_kernel(folder)
    psutil.Process(kernel).parent().parent().kill()
    said, _ = study.communicate(timeout=120)
    assert study.returncode == 0, said
    assert visits(folder / "n128") == 2 and not alive(kernel)


def test_a_head_that_can_t_be_reached_is_said_within_half_a_minute(stub, tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for address in ("127.0.0.1:1", f"127.0.0.1:{silent.getsockname()[1]}", "no-such-host.invalid:6379"):
            began = time.monotonic()
            with pytest.raises(UserError, match=f"--ray {address}: no head of a Ray cluster answers"):
                made(stub, tmp_path / "runs", "--sizes", "128", "--ray", address)
            assert time.monotonic() - began < 30
    for address in ("somewhere", "ray://127.0.0.1:10001", ":6379"):
        with pytest.raises(UserError, match=f"--ray {address}: must be HOST:PORT"):
            made(stub, tmp_path / "runs", "--sizes", "128", "--ray", address)


def test_another_token_is_refused(stub, tmp_path, nodes):
    words = ["--runs-dir", str(tmp_path / "runs"), "--sizes", "128", "--ray", nodes.address, *EACH]
    study = start(stub, *words, env={"RAY_AUTH_TOKEN": "1" * 64}, stderr=subprocess.PIPE, text=True)
    _, said = study.communicate(timeout=60)
    assert study.returncode == 2
    assert f"error: --ray {nodes.address}: no head" in said and "token" in said and "Traceback" not in said


def test_another_version_of_ray_is_refused(stub, tmp_path, nodes):
    words = ["--runs-dir", str(tmp_path / "runs"), "--sizes", "128", "--ray", nodes.address, *EACH]
    study = start(stub, *words, more="import ray; ray.__version__ = '2.59.0'", stderr=subprocess.PIPE, text=True)
    _, said = study.communicate(timeout=60)
    assert study.returncode == 2
    assert "error: --ray" in said and "Ray: 2.59.0" in said and f"Ray: {ray.__version__}" in said
    assert "Traceback" not in said


# --- What a run needs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "asked", "share"),
    [
        ([{"CPU": 64, "GPU": 8}], (None, None), (2, 16)),  # four pairs, the cores dealt out among them
        ([{"CPU": 64, "GPU": 8}, {"CPU": 8}], (None, None), (2, 16)),  # a head without a GPU
        ([{"CPU": 16, "GPU": 1}, {"CPU": 12, "GPU": 1}], (None, None), (1, 12)),
        ([{"CPU": 16, "GPU": 2}], (1, None), (1, 8)),
        ([{"CPU": 1, "GPU": 4}], (None, None), (2, 1)),
        ([{"CPU": 4}, {"CPU": 2}, {"GPU": 0}], (None, None), (0, 2)),
        ([{"CPU": 4}, {"CPU": 2}], (None, 3), (0, 3)),
        ([{"CPU": 16, "GPU": 2}], (0, None), (0, 16)),
        ([{"CPU": 64, "GPU": 8}], (None, 8), (2, 8)),  # cores alone don't turn the GPUs off
    ],
)
def test_the_share_of_a_run(nodes, asked, share):
    assert cluster.share_of_a_run(nodes, *asked) == share


@pytest.mark.parametrize(
    ("asked", "said"), [((2, None), "2 GPUs"), ((None, 9), "9 cores"), ((1, 1), "1 GPUs and 1 cores")]
)
def test_a_run_that_fits_no_node_is_refused(asked, said):
    with pytest.raises(UserError, match=f"no node of the cluster has {said}"):
        cluster.share_of_a_run([{"CPU": 4}, {"CPU": 8}], *asked)


@pytest.mark.parametrize("worth", ["summary.json", "checkpoints/step-000010/state.json", None])
def test_a_failed_try_elsewhere_does_not_replace_what_is_worth_keeping(worth, tmp_path):
    """The node's scratch folder has none of it, so the run's own protection has nothing to protect there."""
    study, scratch = tmp_path / "study", tmp_path / "scratch-1"
    for folder, names in (
        (study, ["config.json", worth or "metrics.jsonl"]),
        (scratch, ["config.json", "failed.json"]),
    ):
        for name in names:
            (folder / "n256" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "n256" / name).write_text("{}")
    (scratch / "n256.log").write_text("out of memory")
    unpack(pack(scratch, [scratch / "n256", scratch / "n256.log"]), study)
    assert (study / "n256.log").read_text() == "out of memory"
    assert (study / "n256" / "failed.json").is_file() == (worth is None)
    assert worth is None or (study / "n256" / worth).is_file()


def wait_for_kernel(folder: Path) -> int:
    """Process id of the first kernel that works for a study, wherever it writes."""
    found = []

    def there() -> bool:
        found[:] = [p.pid for p in psutil.process_iter() if marked(p) == str(folder) and is_kernel(p)]
        return bool(found)

    wait_until(there)
    time.sleep(2)  # it is at work
    return found[0]


def is_kernel(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "ipykernel_launcher" in " ".join(process.cmdline())
    return False


def wait_until(there, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.2)
