"""The training notebook, executed by papermill as a user does it, with real vLLM at toy size."""

import contextlib
import gzip
import html
import ipaddress
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import psutil
import pytest

from lib.files import PROJECT_ROOT, UserError, read_json, read_lines
from lib.run.prepare import prepare
from lib.settings import PARAMETERS, resolve
from lib.study.page import ANALYSIS_NOTEBOOK
from lib.training.policy import load_policy
from lib.training.steps import make_optimizer, train_steps

NOTEBOOK = PROJECT_ROOT / "notebooks" / "train.ipynb"
# In the environment of every run below; none of it may be found in anything that a run writes.
SECRETS = {
    "WANDB_API_KEY": "5ec7e7000000000000000000000000000000cafe",
    "HF_TOKEN": "hf_5ec7e7ThatNobodyShouldSee",
    "AWS_SECRET_ACCESS_KEY": "5ec7e7/That+NobodyShouldSee",
}


def papermill(output: Path, folder: Path, notebook: Path = NOTEBOOK, **parameters) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", str(notebook), str(output), "--no-progress-bar"]
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    environment = os.environ | SECRETS | {"JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def text_of(notebook) -> str:
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    return "\n".join(o.get("text", "") + str(o.get("data", {})) for o in outputs)


def test_committed_notebooks_show_no_path_of_a_machine():
    listed = subprocess.run(["git", "ls-files", "runs"], cwd=PROJECT_ROOT, capture_output=True, text=True).stdout
    paths = [line for line in listed.splitlines() if line.endswith(".ipynb")]
    if not paths:
        pytest.skip("no git checkout with executed notebooks")
    shown = {path: text_of(nbformat.read(PROJECT_ROOT / path, as_version=4)) for path in paths}
    # But for what Python said of a library's file that was compiled for the first time there (runs of commit dd6a2de).
    compiled = re.compile(r"^/\S+/torchao/\S+\.py:\d+: SyntaxWarning: .*\n.*$", re.MULTILINE)
    shown = {path: compiled.sub("", text) for path, text in shown.items()}
    assert [path for path, text in shown.items() if re.search(r"(?<![\w.])/(home|root|work|tmp|usr)/", text)] == []


@pytest.mark.parametrize("name", ["tune", "analysis", "benchmark"])
def test_every_notebook_refuses_a_parameter_that_it_does_not_have(name):
    notebook = nbformat.read(PROJECT_ROOT / f"notebooks/{name}.ipynb", as_version=4)
    (cell,) = (cell for cell in notebook.cells if "refuse_unknown_parameters(" in cell.source)
    with pytest.raises(UserError, match="unknown parameter 'sed'; "):
        exec(cell.source, {"In": ["", "# Parameters\nsed = 1\n"]})
    if name == "tune":
        for own in ("learning_rate", "eval_split"):
            with pytest.raises(UserError, match=f"{own}: not a parameter here"):
                exec(cell.source, {"In": ["", f"# Parameters\n{own} = 1\n"]})


def test_the_parameters_cell_is_literal_and_complete():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    values: dict = {}
    exec(cell.source, {"__builtins__": {}}, values)  # literals need no builtins
    assert tuple(values) == PARAMETERS
    assert all("#" in line for line in cell.source.splitlines() if line.strip())
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(c.get("outputs") for c in notebook.cells)


@pytest.fixture(scope="module")
def toy(tmp_path_factory, tiny_model):
    """A data folder and the parameters of a run of four steps."""
    from conftest import mini_rows, write_rows

    folder = tmp_path_factory.mktemp("toy")
    (folder / "data").mkdir()
    write_rows(folder / "data/sft.jsonl", mini_rows("sft.jsonl", 40))
    write_rows(folder / "data/train.jsonl", mini_rows("train.jsonl", 60))
    write_rows(folder / "data/validation.jsonl", mini_rows("validation.jsonl", 24))
    settings = {
        "n": 16,
        "profile": "mini",
        "data_dir": folder / "data",
        "model": tiny_model,
        "runs_dir": folder / "runs",
    }
    settings |= {"batch_size": 8, "epochs": 2, "n_val": 8, "n_val_final": 12, "max_new_tokens": 8, "precision": "fp32"}
    settings |= {"wandb_mode": "offline"}  # "auto" would go online with the key below
    return folder, settings | {"learning_rate": 0.005, "eval_interval": 3, "log_generations": 2}


@contextlib.contextmanager
def listening_addresses():
    """The addresses on which this process's descendants listen while it lasts."""
    found, stop = set(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    connections = process.net_connections(kind="inet")
                    found.update(c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def executed(toy):
    # From a folder of its own: the notebook must not depend on the working directory.
    folder, settings = toy
    with listening_addresses() as addresses:
        result = papermill(folder / "n16.ipynb", folder, **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    assert addresses and all(ipaddress.ip_address(address).is_loopback for address in addresses), addresses
    return nbformat.read(folder / "n16.ipynb", as_version=4), folder / "runs" / "n16"


def test_the_run_folder_is_complete(executed):
    _, run_dir = executed
    config = json.loads((run_dir / "config.json").read_text())
    assert config["parameters"]["n"] == 16 and config["data"]["selected"] == 16
    assert set(config["parameters"]) == set(PARAMETERS)
    assert config["environment"]["versions"]["torch"].startswith("2.")
    metrics = read_lines(run_dir / "metrics.jsonl")
    assert [m["train_step"] for m in metrics] == [1, 2, 3, 4] and metrics[-1]["epoch"] == 2
    evaluations = read_lines(run_dir / "evaluations.jsonl")
    assert [(e["train_step"], e["split"], e["decoding"]) for e in evaluations] == [
        (0, "full", "sampled"),
        (0, "subset", "sampled"),
        (0, "full", "greedy"),
        (0, "subset", "greedy"),
        (3, "subset", "sampled"),
        (4, "full", "sampled"),
        (4, "subset", "sampled"),
        (4, "full", "greedy"),
        (4, "subset", "greedy"),
    ]
    for e in evaluations:
        assert e["n"] == len(read_lines(run_dir / e["records"])) == {"full": 12, "subset": 8}[e["split"]]
        assert e["sync_proof"]["mean_abs_difference"] <= e["sync_proof"]["tolerance"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["train_tokens"] == sum(m["tokens"] for m in metrics)


def test_the_notebook_shows_the_run_and_no_noise(executed):
    notebook, run_dir = executed
    text = text_of(notebook)
    assert "engine started in" in text and "Measured now" in text and "image/png" in text
    for noise in ("INFO 1", "WARNING", "Loading weights", "it/s]", "Traceback"):
        assert noise not in text
    assert not [o for c in notebook.cells for o in c.get("outputs", []) if o.get("name") == "stderr"]
    assert "vLLM" in (run_dir / "run.log").read_text() or "vllm" in (run_dir / "run.log").read_text()


def test_the_loop_on_the_page_is_that_of_the_library(executed):
    """`train_steps`, which tuning and the benchmark use, gives the same curve to the digit."""
    _, run_dir = executed
    settings = read_json(run_dir / "config.json")["parameters"]
    config = resolve(settings | {"run_name": "by-the-library"})
    run = prepare(config)
    policy = load_policy(config.model, "cpu")
    optimizer = make_optimizer(policy, config.weight_decay)
    steps = train_steps(policy, optimizer, run.batches, config.optimization, run.sizes["selected"])
    timed = ("seconds", "tokens_per_second", "wait_seconds")
    theirs = [{k: v for k, v in row.items() if k not in timed} for row in read_lines(run_dir / "metrics.jsonl")]
    assert [{k: v for k, v in row.items() if k not in timed} for row in steps] == theirs


def test_the_notebook_shows_the_course_s_loss_equal_to_the_packed_one(executed):
    notebook, _ = executed
    said = re.search(r"([\d.]+) by the course's functions, ([\d.]+) packed, over (\d+) response", text_of(notebook))
    course, packed = float(said[1]), float(said[2])
    assert course == pytest.approx(packed, abs=2e-5) and course > 0.1 and int(said[3]) > 20


def test_no_text_of_foreign_data_is_shown(executed, toy):
    """Executed notebooks are published: of traces and problems they show lengths and ids, unless they are our own."""
    folder, _ = toy
    text = text_of(executed[0])
    rows = [row for name in ("sft", "validation") for row in read_lines(folder / f"data/{name}.jsonl")]
    problems = [row.get("problem") or row["prompt"].partition("User: ")[2][:40] for row in rows]
    responses = [row["response"][:30] for row in rows if "response" in row]
    assert len(responses) == 40 and not [p for p in problems + responses if p in text or html.escape(p) in text]
    assert "tokens of the prompt (grey)" in text and "▪" in text


def test_no_secret_is_written(executed):
    """Guards against environments in configs, logs, notebooks and wandb's offline files."""
    _, run_dir = executed
    files = [path for path in run_dir.parents[1].rglob("*") if path.is_file() and "data" not in path.parts]
    assert any(path.suffix == ".wandb" for path in files) and run_dir.with_suffix("") / "run.log" in files
    for path in files:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, f"{name} in {path}"


def test_a_second_run_reuses_the_base_and_repeats_the_curve(toy, executed):
    """And an evaluation beside training is one of the weights that were sent, not of those that training has then."""
    folder, settings = toy
    result = papermill(folder / "again.ipynb", folder, **settings, run_name="again", eval_beside_training=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Reused from" in text_of(nbformat.read(folder / "again.ipynb", as_version=4))
    first, second = (read_lines(folder / "runs" / name / "metrics.jsonl") for name in ("n16", "again"))
    assert [m["loss"] for m in first] == [m["loss"] for m in second]
    reused = read_lines(folder / "runs/again/evaluations.jsonl")[0]
    assert reused["eval_step"] == 0 and len(read_lines(folder / "runs/again" / reused["records"])) == reused["n"] == 12
    evaluations = [read_lines(folder / "runs" / name / "evaluations.jsonl") for name in ("n16", "again")]
    assert [e["train_step"] for e in evaluations[0]] == [e["train_step"] for e in evaluations[1]]
    for before, after in zip(*evaluations, strict=True):
        first, second = (
            read_lines(folder / "runs" / name / e["records"]) for name, e in (("n16", before), ("again", after))
        )
        without = {"token_entropy": None} if before["train_step"] == 3 else {}  # the policy had moved on
        assert [record | without for record in first] == [record | without for record in second]


@pytest.mark.parametrize("kept", [0, 3])
def test_a_run_comes_to_its_end_with_few_responses_or_none(toy, kept):
    """From its own base on, as on a machine that has no other run."""
    folder, settings = toy
    few = {"keep_responses": kept, "log_generations": 0, "max_steps": 1, "runs_dir": folder / f"few{kept}"}
    result = papermill(folder / "few.ipynb", folder, **(settings | few), run_name="few")
    assert result.returncode == 0, result.stderr[-3000:]
    shown = text_of(nbformat.read(folder / "few.ipynb", as_version=4))
    assert ("The text of no response is kept" in shown) is (kept == 0) and ("format_reward" in shown) is (kept > 0)
    lines = read_lines(few["runs_dir"] / "few/evaluations.jsonl")
    records = [record for line in lines for record in read_lines(few["runs_dir"] / "few" / line["records"])]
    assert {r["response"] is None for r in records} == ({True} if kept == 0 else {True, False})
    report = papermill(folder / "report.ipynb", folder, ANALYSIS_NOTEBOOK, runs_dir=few["runs_dir"])
    assert report.returncode == 0, report.stderr[-3000:]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"epoch": 3}, "unknown parameter 'epoch'; did you mean 'epochs'"), ({"n": 99}, "n=99: there are only 40")],
)
def test_a_mistake_ends_the_notebook_in_one_clear_line(toy, wrong, message):
    folder, settings = toy
    result = papermill(folder / "wrong.ipynb", folder, **(settings | {"run_name": "wrong"} | wrong))
    assert result.returncode != 0 and message in result.stderr
    assert not (folder / "runs" / "wrong").exists()
