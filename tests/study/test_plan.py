"""The plan: which runs a study makes, what it refuses, and whether what is there already belongs to it. No process."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from stub_study import finished_run, made, settle_stub, stub_notebook  # noqa: F401

from lib.files import PROJECT_ROOT, UserError, absolute, file_hashes, write_json
from lib.settings import PROFILES
from lib.study import command as study
from lib.study import execution as notebooks
from lib.study import plan


def test_the_six_runs_of_the_assignment_in_order(stub, tmp_path):
    runs = plan.plan(tmp_path)
    assert [run.name for run in runs] == ["n128", "n256", "n512", "n1024", "full", "filtered"]
    assert [(run.parameters["n"], run.parameters["filtered"]) for run in runs[-2:]] == [("all", False), ("all", True)]


def test_more_seeds_give_more_runs_named_by_them(stub, tmp_path):
    names = [run.name for run in plan.plan(tmp_path, sizes=["128", "filtered"], seeds=[0, 3])]
    assert names == ["n128", "filtered", "n128-seed3", "filtered-seed3"]


@pytest.mark.parametrize(
    ("parameter", "value", "said"),
    [
        ("epoch", 3, "did you mean epochs?"),  # papermill would warn and run with the default
        ("colour", "red", "known are"),
        ("n", 64, "--sizes"),
        ("seed", 1, "--seeds"),
        ("run_name", "mine", "--runs-dir"),
        ("filtered", True, "--sizes"),
        ("overwrite", "yes", "True or False"),
    ],
)
def test_a_parameter_that_cannot_be_passed_is_refused_by_name(stub, tmp_path, parameter, value, said):
    with pytest.raises(UserError, match=f"-p {parameter}.*{said}"):
        made(stub, tmp_path / "runs", "-p", parameter, str(value))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("seed", ["-1", str(1 << 32)])
def test_a_seed_that_is_none_is_refused(stub, tmp_path, seed):
    with pytest.raises(UserError, match=f"--seeds {seed}: must be at least 0 and below"):
        made(stub, tmp_path / "runs", "--seeds", seed)


@pytest.mark.parametrize("size", ["0", "-3", "1.5", "everything", "²"])
def test_a_size_that_is_none_is_refused(stub, tmp_path, size):
    with pytest.raises(UserError, match=f"--sizes {size}"):
        plan.plan(tmp_path, sizes=[size])
    with pytest.raises(UserError, match=f"--sizes {size}"):
        made(stub, tmp_path / "runs", f"--sizes={size}")
    assert not (tmp_path / "runs").exists()


def test_the_control_has_as_many_traces_as_are_correct_and_any(stub, tmp_path):
    """A size asked for twice, by its number and as the control, is one run."""
    runs = plan.plan(tmp_path, ["1024", "filtered", "control"], [0, 1], counts={"correct": 1370})
    names = ["n1024", "filtered", "n1370", "n1024-seed1", "filtered-seed1", "n1370-seed1"]
    assert [run.name for run in runs] == names
    assert (runs[2].parameters["n"], runs[2].parameters["filtered"]) == (1370, False)
    assert [run.name for run in plan.plan(tmp_path, ["1370", "control"], counts={"correct": 1370})] == ["n1370"]
    with pytest.raises(UserError, match=r"--sizes control: sft\.jsonl lacks gold answers"):
        plan.plan(tmp_path, ["control"], counts={"correct": None})


def test_the_control_is_counted_in_the_data(data_dir):
    """Counted here by grading the traces one by one."""
    grading = pytest.importorskip("lib.grading")
    rows = [json.loads(line) for line in (data_dir / "sft.jsonl").read_text().splitlines()]
    kept = {(row["prompt"], row["response"]): row["ground_truth"] for row in rows}
    correct = sum(grading.r1_zero_reward_fn(text, gold)["reward"] == 1 for (_, text), gold in kept.items())
    assert 0 < correct < len(kept)
    counts = plan.count_examples({"data_dir": str(data_dir)})
    assert (counts["correct"], counts["distinct"]) == (correct, len(kept))


def test_seeds_are_added_to_a_folder_by_a_second_command(stub, tmp_path):
    """Three seeds of every size, then two more of the full set alone: only what is missing is made."""
    sizes, folder = ["--sizes", "128", "all"], tmp_path / "runs"
    first = made(stub, folder, *sizes, "--seeds", "0", "1")
    second = made(stub, folder, "--sizes", "all", "--seeds", "0", "1", "2")
    assert (first.finished, first.failed) == (["n128", "full", "n128-seed1", "full-seed1"], {})
    assert (second.kept, second.finished) == (["full", "full-seed1"], ["full-seed2"])


def test_values_on_the_command_line_keep_their_type():
    arguments = study.read_arguments(
        [*("-p", "a", "1e-5"), *("-p", "b", "4"), *("-p", "c", "True"), *("-p", "d", "cuda:0"), *("-p", "e", "None")]
    )
    assert dict(arguments.p) == {"a": 1e-5, "b": 4, "c": True, "d": "cuda:0", "e": None}


def test_help_names_every_argument(capsys):
    with pytest.raises(SystemExit) as left:
        study.read_arguments(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    for word in (
        "--profile",
        "--runs-dir",
        "--sizes",
        "--seeds",
        "--match",
        "--tune",
        "control",
        "--jobs",
        "-p NAME VALUE",
        "--report-only",
        "Ctrl-C",
    ):
        assert word in text


def test_a_study_under_nohup_outlives_its_terminal(tmp_path):
    before = {number: signal.getsignal(number) for number in study.SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert study.main(["--report-only", "--runs-dir", str(tmp_path / "none")]) == 2
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is study.stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_equal_steps_give_each_size_the_steps_of_the_full_set(stub, tmp_path):
    """epochs are chosen so that batching counts the same steps for every size; recomputed with its own function."""
    batching = pytest.importorskip("lib.training.batching")
    counts = {"distinct": 1707, "correct": 1370}
    values = {"batch_size": 48, "epochs": 3, "max_steps": None}
    runs = plan.match_steps(plan.plan(tmp_path), values, counts)
    sizes = {"n128": 128, "n256": 256, "n512": 512, "n1024": 1024, "full": 1707, "filtered": 1370}
    steps = {run.name: batching.number_of_steps(sizes[run.name], 48, run.parameters["epochs"]) for run in runs}
    assert set(steps.values()) == {batching.number_of_steps(1707, 48, 3)}
    assert next(run for run in runs if run.name == "n128").parameters["epochs"] > 39
    counts["correct"] = None
    with pytest.raises(UserError, match=r"--match steps: .* lacks gold answers"):
        plan.match_steps(plan.plan(tmp_path), values, counts)
    assert plan.match_steps(plan.plan(tmp_path, sizes=["128", "all"]), values, counts)


# --- One rule for paths --------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A user in a folder of their own, whose home is beside it."""
    for name in ("work", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("~/my-study", "{home}/my-study"),
        ("~", "{home}"),
        ("there", "{work}/there"),  # it exists in the user's folder
        ("./there/../new", "{project}/new"),
        ("not-there", "{project}/not-there"),
        ("{work}/new", "{work}/new"),
    ],
)
def test_the_study_s_folder(elsewhere, given, meant):
    (elsewhere / "work/there").mkdir()
    places = {"home": elsewhere / "home", "work": elsewhere / "work", "project": PROJECT_ROOT}
    assert study.read_folder(given.format(**places)) == Path(meant.format(**places))


def test_a_study_s_folder_that_is_none_is_refused(elsewhere, capsys):
    (elsewhere / "work/file").write_text("")
    for given, said in (
        ("file", "can't be locked: File exists"),
        ("", "must name a folder"),
        (" ", "must name a folder"),
    ):
        assert study.main([f"--runs-dir={given}", "--profile", "mini"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --runs-dir") and said in error


@pytest.mark.parametrize("how", ["relative", "home", "absolute"])
@pytest.mark.parametrize("name", ["data_dir", "model", "prompt_template"])
def test_a_path_means_the_same_to_the_study_and_to_its_runs(elsewhere, parameters, monkeypatch, name, how):
    """The study is asked in the user's folder; the notebook resolves what it passes on in the project's."""
    template = elsewhere / "given.prompt"
    shutil.copy(PROJECT_ROOT / "lib/prompts/r1_zero.prompt", template)
    original = Path(template if name == "prompt_template" else parameters[name])
    target = elsewhere / ("home" if how == "home" else "work") / "given"
    (shutil.copytree if original.is_dir() else shutil.copy)(original, target)
    given = {"relative": "given", "home": "~/given", "absolute": str(target)}[how]
    toy = {key: value for key, value in parameters.items() if key in ("profile", "data_dir", "model", "n_val")}
    settings = plan.settle(toy | {name: given}, parameters | {"runs_dir": None})
    passed = plan.as_settled(toy | {name: given}, settings)
    monkeypatch.chdir(PROJECT_ROOT)  # where a study's notebooks run
    assert absolute(passed[name]) == target


def test_a_setting_is_the_same_wherever_it_is_written_from(elsewhere, tmp_path):
    """One run was made by a project beside the model's folder, one by a project in it, one by a user at home."""
    for name, model in (("beside", "../models/one"), ("whole", str(PROJECT_ROOT.parent / "models/one"))):
        finished_run(tmp_path / name, model=model)
        run = plan.PlannedRun(name, {"n": 128, "filtered": False, "seed": 0}, Path("train.ipynb"))
        asked = {"model": str(PROJECT_ROOT.parent / "models/one")}
        assert plan.differences(run, tmp_path / name, asked) == []
        [said] = plan.differences(run, tmp_path / name, {"model": "Qwen/Qwen2.5-Math-1.5B"})
        assert said == f"model is {model!r} there, 'Qwen/Qwen2.5-Math-1.5B' is asked for"


# --- What is there already ------------------------------------------------------------------------------------------


def test_a_finished_run_with_other_settings_is_named_with_what_differs_and_what_to_do(stub, tmp_path):
    finished_run(tmp_path / "runs/n128", learning_rate=0.02, epochs=7)
    with pytest.raises(UserError) as refused:
        made(stub, tmp_path / "runs", "--sizes", "128", "256", "-p", "learning_rate", "0.003")
    said = str(refused.value)
    assert "learning_rate is 0.02 there, 0.003 is asked for" in said
    assert "epochs is 7 there, 3 is asked for" in said
    assert "--runs-dir" in said and "overwrite" in said
    assert not (tmp_path / "runs/n256").exists(), "nothing may start before the conflict is solved"


def test_a_finished_run_of_other_data_is_no_part_of_the_study(tmp_path):
    folder = shutil.copytree(PROFILES["mini"]["data_dir"], tmp_path / "data")
    finished_run(tmp_path / "n128", data_dir=str(folder))
    config = json.loads((tmp_path / "n128" / "config.json").read_text())
    write_json(tmp_path / "n128" / "config.json", config | {"data": {"files": file_hashes(folder)}})
    run = plan.PlannedRun("n128", {"n": 128, "filtered": False, "seed": 0}, Path("train.ipynb"))
    assert plan.differences(run, tmp_path / "n128", {"data_dir": str(folder)}) == []
    (folder / "validation.jsonl").write_text((folder / "validation.jsonl").read_text()[:-1])
    said = plan.differences(run, tmp_path / "n128", {"data_dir": str(folder)})
    assert said == ["validation.jsonl is not the file that it was"]


def test_a_setting_left_to_the_profile_is_compared_with_the_profile(stub, tmp_path):
    """learning_rate=None means the profile's value: a run made with another one is no part of this study."""
    rate = PROFILES["mini"]["learning_rate"]
    run = plan.plan(tmp_path, sizes=["128"], shared={"profile": "auto"})[0]
    settings = settle_stub({"profile": "auto"}, notebooks.notebook_parameters(stub))
    finished_run(tmp_path / "same", learning_rate=rate)
    finished_run(tmp_path / "other", learning_rate=rate * 2)
    assert plan.differences(run, tmp_path / "same", settings) == []
    assert plan.differences(run, tmp_path / "other", settings) == [
        f"learning_rate is {rate * 2} there, {rate} is asked for"
    ]


def test_a_short_trial_is_not_kept_as_the_study(stub, tmp_path):
    """max_steps=None means no limit: it is a value, not left open."""
    finished_run(tmp_path / "n128", max_steps=5)
    run = plan.plan(tmp_path, sizes=["128"])[0]
    assert plan.differences(run, tmp_path / "n128", {"max_steps": None}) == ["max_steps is 5 there, None is asked for"]


def test_where_a_run_was_made_does_not_count(stub, tmp_path):
    finished_run(tmp_path / "n128", train_device="cuda:0", runs_dir="elsewhere", wandb_mode="online")
    settings = {"train_device": "cpu", "runs_dir": "here", "wandb_mode": "disabled"}
    run = plan.plan(tmp_path, sizes=["128"], shared=settings)[0]
    assert plan.differences(run, tmp_path / "n128", settings) == []
