"""Public data in the course's layout, from files of each source's fields that the tests write; no network."""

import csv
import datetime
import hashlib
import json
import os
import subprocess
import sys
import threading
from decimal import Decimal
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from lib import get_data
from lib.data import load_evaluation_problems, load_examples, load_problems, select_examples
from lib.files import PROJECT_ROOT
from lib.grading import r1_zero_reward_fn
from lib.run.prepare import prepare
from lib.settings import resolve

NAMES = ["Ann", "Bob", "Cem", "Dora", "Eve", "Finn", "Gita", "Hugo", "Ines", "Jan", "Kim", "Lea"]
THINGS = ["apples", "books", "coins", "drums", "eggs", "forks", "guns of water", "hats", "inks", "jars"]


def problem(number: int) -> tuple[str, int, int]:
    a, b = 3 + number, 2 + number * 7 % 11
    name, thing = NAMES[number % len(NAMES)], THINGS[number % len(THINGS)]
    return f"{name} has {a} {thing} and gets {b} more. How many {thing} are there?", a, b


def gsm8k(number: int) -> dict:
    text, a, b = problem(number)
    return {"question": text, "answer": f"There are {a}+{b}=<<{a}+{b}={a + b}>>{a + b} of them.\n#### {a + b}"}


def lighteval(number: int) -> dict:
    text, a, b = problem(number)
    solution = rf"We add: $${a} + {b} = \boxed{{\frac{{{2 * (a + b)}}}{{2}}}}$$"
    return {"problem": text, "level": f"Level {1 + number % 5}", "solution": solution, "type": "Prealgebra"}


def nlile(number: int) -> dict:
    row = lighteval(number)
    return {
        "problem": row["problem"], "solution": row["solution"], "answer": str(sum(problem(number)[1:])),
        "subject": row["type"], "level": 1 + number % 5, "unique_id": f"train/{number}.json",
    }  # fmt: skip


def garg(number: int) -> dict:
    text, a, b = problem(number)
    said = a + b + (number % 3 == 0)  # a third of the traces is wrong
    trace = f"I add {a} and {b}. </think> <answer> {said} </answer>"
    answers = {"extracted_answer": str(said), "expected_answer": str(a + b)}
    return {"problem": text, "reasoning_trace": trace} | answers


def write(path: Path, rows: list[dict]) -> Path:
    """In the format that the name says; garg's files are called .jsonl and hold one JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow, which `pip install -e '.[data]'` brings")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["get_data", *map(str, arguments)])
    get_data.main()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


MADE = {"gsm8k": gsm8k, "math": lighteval, "garg": garg}


@pytest.mark.parametrize("preset", MADE)
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_a_file_of_each_preset_becomes_data_that_a_run_reads(preset, kind, parameters, tmp_path, monkeypatch, capsys):
    training = write(tmp_path / f"a.{kind}", [MADE[preset](number) for number in range(60)])
    validation = write(tmp_path / f"b.{kind}", [MADE[preset](number) for number in range(60, 80)])
    folder = tmp_path / "made" / preset
    run(monkeypatch, preset, folder, "--from", training, "--validation", validation)
    assert sorted(path.name for path in folder.iterdir()) == [
        "SOURCE.json", "sft.jsonl", "train.jsonl", "validation.jsonl"
    ]  # fmt: skip
    examples, template = load_examples(folder)
    assert template.name == "r1_zero" and len(examples) == 54  # a tenth has no trace, for tuning
    rewards = [r1_zero_reward_fn(example.response, example.answer) for example in examples]
    assert all(reward["format_reward"] == 1 for reward in rewards)
    correct = sum(reward["reward"] == 1 for reward in rewards)
    assert correct == 54 if preset != "garg" else 30 <= correct < 54
    assert len(select_examples(examples, "all", True, 0).examples) == correct
    problems = load_problems(folder / "validation.jsonl")
    assert [p.problem for p in problems] == [problem(number)[0] for number in range(60, 80)]
    assert all(int(eval(p.answer.replace(r"\frac{", "(").replace("}{", ")/(").replace("}", ")"))) == sum(
        problem(number)[1:]) for number, p in zip(range(60, 80), problems, strict=True)
    )  # fmt: skip
    levels = {(p.level, p.subject) for p in problems}
    assert levels == ({(f"Level {i}", "Prealgebra") for i in range(1, 6)} if preset == "math" else {(None, None)})
    tuning = load_evaluation_problems(folder, "tuning", examples)
    assert len(tuning) == 6 and not {p.problem for p in tuning} & {e.problem for e in examples}
    source = json.loads((folder / "SOURCE.json").read_text())
    assert source["preset"] == preset and source["counts"]["kept_for_tuning"] == 6
    assert source["files"][training.name] == hashlib.sha256(training.read_bytes()).hexdigest()
    for name, digest in source["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert str(tmp_path) not in (folder / "SOURCE.json").read_text()
    assert "kept for tuning: 6" in capsys.readouterr().out
    settings = parameters | {"data_dir": str(folder), "max_length": 2048}
    made = prepare(resolve(settings))
    assert len(made.problems) == 20 and made.sizes["selected"] == 16


def own(number: int) -> dict:
    text, a, b = problem(number)
    return {"frage": text, "weg": f"I add {a} and {b}.", "zahl": a + b}


OWN = ["--map", "problem=frage", "trace=weg", "answer=zahl"]


@pytest.mark.parametrize(
    ("preset", "make", "options"),
    [("gsm8k", gsm8k, []), ("math", lighteval, []), ("garg", garg, []), ("files", own, OWN)],
)
def test_a_preset_from_its_file_to_a_finished_run_by_two_commands(preset, make, options, tmp_path, tiny_model):
    training, made = write(tmp_path / "a.jsonl", [make(number) for number in range(60)]), tmp_path / "made"
    data = [sys.executable, "-m", "lib.get_data", preset, str(made), "--from", str(training), *options]
    train = [sys.executable, "-m", "papermill", "notebooks/train.ipynb", str(tmp_path / "n16.ipynb")]
    toy = {"n": 16, "profile": "mini", "model": tiny_model, "data_dir": made, "runs_dir": tmp_path}
    toy |= {"max_steps": 2, "n_val": 4, "max_new_tokens": 8, "max_length": 2048, "wandb_mode": "disabled"}
    for name, value in toy.items():
        train += ["-p", name, str(value)]
    environment = os.environ | {"JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter")}
    for command in (data, train):
        done = subprocess.run(command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    run_dir = tmp_path / "n16"
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "finished"
    last = [line for line in read(run_dir / "evaluations.jsonl") if line["split"] == "full"][-1]
    assert last["train_step"] == 2 and last["n"] == len(read(made / "validation.jsonl")) == 6
    assert [bool(last[f"by_{name}"]) for name in ("level", "subject")] == [preset == "math"] * 2


def test_gsm8k_traces_are_without_the_calculator_s_notes(tmp_path, monkeypatch):
    training = write(tmp_path / "a.jsonl", [gsm8k(number) for number in range(20)])
    run(monkeypatch, "gsm8k", tmp_path / "made", "--from", training)
    row = read(tmp_path / "made" / "sft.jsonl")[0]
    number = next(n for n in range(20) if problem(n)[0] in row["prompt"])
    _, a, b = problem(number)
    assert row["response"] == f" There are {a}+{b}={a + b} of them. </think> <answer> {a + b} </answer>"
    assert row["ground_truth"] == str(a + b) and row["prompt"].endswith("Assistant: <think>")


def test_the_other_copy_of_math_has_integer_levels_and_answers_of_its_own(tmp_path, monkeypatch):
    training = write(tmp_path / "a.jsonl", [nlile(number) for number in range(20)])
    run(monkeypatch, "math", tmp_path / "made", "--from", training)
    rows = read(tmp_path / "made" / "train.jsonl")
    assert {row["level"] for row in rows} == {f"Level {level}" for level in range(1, 6)}
    assert all(row["subject"] == "Prealgebra" and row["answer"].isdecimal() for row in rows)


def test_a_trace_with_tags_of_its_own_is_taken_as_it_is(tmp_path, monkeypatch):
    rows = [garg(number) for number in range(20)]
    rows[0]["reasoning_trace"] = "<think>" + rows[0]["reasoning_trace"]
    rows[1]["reasoning_trace"] = "I only reason."
    run(monkeypatch, "garg", tmp_path / "made", "--from", write(tmp_path / "a.jsonl", rows))
    made = {row["prompt"].split("User: ")[-1].split("\n")[0]: row for row in read(tmp_path / "made" / "sft.jsonl")}
    assert all(row["response"].count("<think>") == 0 and row["response"].startswith(" I ") for row in made.values())
    if reasoned := made.get(rows[1]["problem"]):
        assert reasoned["response"] == f" I only reason. </think> <answer> {rows[1]['extracted_answer']} </answer>"


def test_columns_of_a_user_s_own_file_are_mapped(tmp_path, monkeypatch):
    rows = [{"frage": problem(n)[0], "weg": "So.", "zahl": sum(problem(n)[1:]), "thema": "Sums"} for n in range(20)]
    rows += [{"frage": "And what is 17 times 23, please?", "weg": None, "zahl": 391, "thema": "Products"}]
    training, folder = write(tmp_path / "a.json", rows), tmp_path / "made"
    mapping = ["--map", "problem=frage", "trace=weg", "--map", "answer=zahl", "--map", "subject=thema"]
    run(monkeypatch, "files", folder, "--from", training, *mapping)
    found = read(folder / "train.jsonl") + read(folder / "validation.jsonl")
    assert len(found) == 21 and {row["subject"] for row in found} == {"Sums", "Products"}
    assert all(isinstance(row["answer"], str) and "level" not in row for row in found)
    # One problem has no trace already: the others keep theirs.
    traced = {row["prompt"].split("User: ")[-1].split("\n")[0] for row in read(folder / "sft.jsonl")}
    assert traced == {row["problem"] for row in read(folder / "train.jsonl")} - {rows[-1]["frage"]}


def test_the_kinds_of_a_parquet_file_are_read_or_refused_with_their_row(tmp_path, monkeypatch, capsys):
    rows = [{"problem": problem(n)[0], "trace": "So.", "answer": Decimal(n) / 8} for n in range(8, 28)]
    run(monkeypatch, "files", tmp_path / "made", "--from", write(tmp_path / "a.parquet", rows))
    found = read(tmp_path / "made" / "train.jsonl") + read(tmp_path / "made" / "validation.jsonl")
    assert {Fraction(row["answer"]) for row in found} == {Fraction(n, 8) for n in range(8, 28)}
    for wrong in (datetime.date(2026, 1, 2), b"16", ["16"], {"value": 16}, True):
        training = write(tmp_path / "b.parquet", [row | {"answer": wrong} for row in rows])
        with pytest.raises(SystemExit):
            run(monkeypatch, "files", tmp_path / "none", "--from", training)
        assert "b.parquet, row 1: 'answer' must be a text or a number, not " in capsys.readouterr().err.splitlines()[-1]


def test_near_duplicates_of_validation_problems_leave_both_training_files(tmp_path, monkeypatch):
    text = "A train covers 120 kilometres in 3 hours. What is its average speed in kilometres an hour?"
    near = "A train covers 120 kilometres in 3 hours! What is its average speed, in kilometres an hour"
    rows = [gsm8k(number) for number in range(20)] + [{"question": near, "answer": "40.\n#### 40"}]
    training = write(tmp_path / "a.jsonl", rows)
    validation = write(tmp_path / "b.jsonl", [{"question": text, "answer": "40.\n#### 40"}, gsm8k(3)])
    run(monkeypatch, "gsm8k", tmp_path / "made", "--from", training, "--validation", validation)
    for name in ("sft.jsonl", "train.jsonl"):
        content = (tmp_path / "made" / name).read_text()
        assert "A train covers" not in content and problem(3)[0] not in content and problem(4)[0][:3] in content
    assert json.loads((tmp_path / "made" / "SOURCE.json").read_text())["counts"]["near_duplicates_of_validation"] == 2
    assert len(read(tmp_path / "made" / "train.jsonl")) == 19


def test_a_held_out_validation_set_is_the_same_every_time(tmp_path, monkeypatch):
    training = write(tmp_path / "a.jsonl", [gsm8k(number) for number in range(40)])
    for name in ("one", "two"):
        run(monkeypatch, "gsm8k", tmp_path / name, "--from", training)
    names = ["sft.jsonl", "train.jsonl", "validation.jsonl"]
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)
    validation = {row["problem"] for row in read(tmp_path / "one" / "validation.jsonl")}
    assert len(validation) == 4 and not validation & {row["problem"] for row in read(tmp_path / "one" / "train.jsonl")}


def test_a_few_shot_template_serves_data_and_evaluation(tmp_path, monkeypatch):
    template = tmp_path / "few_shot.prompt"
    template.write_text(
        "User: What is 2+2?\nAssistant: <think> 4. </think> <answer> 4 </answer>\n\nUser: {question}\n<think>"
    )
    training = write(tmp_path / "a.jsonl", [gsm8k(number) for number in range(20)])
    folder = tmp_path / "made"
    run(monkeypatch, "gsm8k", folder, "--from", training, "--prompt-template", template)
    examples, found = load_examples(folder, str(template))
    assert found.name == "few_shot" and {e.problem for e in examples} <= {problem(n)[0] for n in range(20)}
    assert found.fill("Why?").endswith("<answer> 4 </answer>\n\nUser: Why?\n<think>")


GOOD = [gsm8k(number) for number in range(20)]


@pytest.mark.parametrize(
    ("name", "content", "arguments", "said"),
    [
        ("a.jsonl", '{"question": "What?"', [], "a.jsonl, line 1: not valid JSON"),
        ("a.json", '[{"question": "What?"', [], "a.json: not valid JSON"),
        ("a.json", "[1, 2]", [], "a.json: must be a list of JSON objects"),
        ("a.txt", "x", [], "a.txt: must be a .json, .jsonl, .csv or .parquet file"),
        ("a.jsonl", "", [], "a.jsonl: holds no rows"),
        ("a.jsonl", '{"q": "What?", "answer": "1"}\n', [], "line 1: no problem in it; its columns are q, answer"),
        ("a.jsonl", '{"question": "What?"}\n', [], "no training problem has an answer"),
        ("a.csv", 'question,answer\n"What?,1', [], "a.csv: not valid CSV"),
        ("a.csv", "question,answer\nWhat?,1\nWhy?,2,3\n", [], "a.csv: not valid CSV"),
        ("a.csv", "", [], "a.csv: not valid CSV"),
        ("a.csv", "question,answer\nA, or B?,1\nC, or D?,2\n", [], "a.csv: not valid CSV: row 1, line 2, has 3 values"),
        ("a.csv", "question,answer\nWhat?,1\nWhy?\n", [], "row 2, line 3, has 1 values for 2 columns"),
        ("a.csv", 'question,answer\n"a \\"b\\" c",1\n', [], "a.csv: not valid CSV: line 2: "),
        ("a.csv", "question,answer,answer\nWhat?,1,2\n", [], "first line must name the columns, each in another"),
        ("a.csv", "question,answer\n", [], "a.csv: holds no rows"),
        ("a.json", "[]", [], "a.json: holds no rows"),
        ("a.json", '[{"question": "W"}, 3]', [], "must be a list of JSON objects, and row 2 is none"),
        ("a.json", '{"data": [\n{"question": "W"}]}', [], "a list of JSON objects, and is one object with data"),
        ("a.json", '[{"question": "\\ud83d", "answer": "1"}]', [], "a.json: not valid JSON"),
        ("a.json", "[" * 100_000, [], "a.json: not valid JSON"),
        ("a.jsonl", None, ["missing.parquet"], "missing.parquet: no such file"),
        ("a.jsonl", None, ["--map", "trace=answer", "trace=question"], "trace=question: trace has a column already"),
        ("a.jsonl", None, ["--repo", "some/set"], "--repo and --revision: say what comes from the hub"),
        ("a.jsonl", None, ["--prompt-template", "~nobody-here/x"], "there is no such user's home folder"),
        ("a.parquet", "PAR1", [], "a.parquet: not valid PARQUET"),
        ("a.jsonl", None, ["--map", "problem"], "--map problem: must be FIELD=COLUMN, with a FIELD of problem, trace"),
        ("a.jsonl", None, ["--map", "colour=x"], "--map colour=x: must be FIELD=COLUMN"),
        ("a.jsonl", None, ["--validation", "a.jsonl"], "no near duplicate in the validation set"),
        *[
            ("a.jsonl", None, ["--map", f"{field}=WRONG"], f"--map {field}=WRONG: no row has a column WRONG; there are")
            for field in ("problem", "trace", "answer", "final", "level", "subject")
        ],
        ("a.jsonl", None, ["--prompt-template", "missing.prompt"], "missing.prompt: no such file"),
        ("b.jsonl", None, [], "a.jsonl: no such file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(
    name, content, arguments, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / name, GOOD) if content is None else tmp_path / name
    if content is not None:
        path.write_text(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit):
        run(monkeypatch, "gsm8k", tmp_path / "made", "--from", "a.jsonl" if name == "b.jsonl" else name, *arguments)
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


ADDING = [{"problem": problem(n)[0], "answer": str(sum(problem(n)[1:]))} for n in range(20)]


@pytest.mark.parametrize(
    ("trace", "said", "right"),
    [
        ("I add them.", " I add them. </think> <answer> {} </answer>", 1),
        (r"It is \boxed{{{}}}.", r" It is \boxed{{{}}}. </think> <answer> {} </answer>", 1),
        (r"It is $\boxed {}$", r" It is $\boxed {}$ </think> <answer> {} </answer>", 1),
        (r"It is \fbox{{{}}}.", r" It is \fbox{{{}}}. </think> <answer> {} </answer>", 1),
        (r"It is \boxed{{99}}.", r" It is \boxed{{99}}. </think> <answer> 99 </answer>", 0),
        ("<think>\nI add.\n</think>\n<answer>\n{}\n</answer>", " I add. </think> <answer> {} </answer>", 1),
        ("I add.</think><answer>{}</answer>", " I add. </think> <answer> {} </answer>", 1),
        ("I add. <answer>98</answer> No: <answer>{}</answer>.", None, 1),
        (
            r"<think>I add.</think> It is \boxed{{{}}}.",
            " I add.\nIt is \\boxed{{{}}}. </think> <answer> {} </answer>",
            1,
        ),
        ("<think>I add. </think> <answer> {} </answer>", " I add. </think> <answer> {} </answer>", 1),
    ],
)
def test_a_trace_gets_the_form_and_keeps_its_own_answer(trace, said, right, tmp_path, monkeypatch):
    rows = [row | {"trace": trace.format(row["answer"])} for row in ADDING]
    run(monkeypatch, "files", tmp_path / "made", "--from", write(tmp_path / "a.jsonl", rows))
    made = read(tmp_path / "made" / "sft.jsonl")
    assert len(made) == 16
    for row in made:
        assert r1_zero_reward_fn(row["response"], row["ground_truth"])["format_reward"] == 1
        assert r1_zero_reward_fn(row["response"], row["ground_truth"])["reward"] == right
        assert said is None or row["response"] == said.format(*[row["ground_truth"]] * 2)
    counts = json.loads((tmp_path / "made" / "SOURCE.json").read_text())["counts"]
    assert counts.get("traces_given_the_gold_answer", 0) == 20 * (trace == "I add them.")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}.", "12"),
        (r"\boxed{1}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"$\boxed 0.5$.", "0.5"),
        (r"\boxed 1,250.", "1,250"),
        (r"\boxed -7, as said", "-7"),
        (r"\fbox {x+1}", "x+1"),
        (r"\boxed{\text{(A)}}", r"\text{(A)}"),
        (r"\boxed{", None),
        (r"so \boxed{8}. (Put it in \boxed.)", "8"),
        (r"so \boxed {8}: no \fbox needed", "needed"),
        (r"\boxed{8}, no: \boxed{\frac{1}{2", None),
        ("12", None),
    ],
)
def test_the_answer_in_a_box(text, answer):
    assert get_data.boxed_answer(text) == answer


@pytest.mark.parametrize(
    "trace", ["<think>\n3+5 = 8.\n</think>\n\nThe answer is 8.", "<think>\nLet me see", r"It is \boxed{\frac{1}{2"]
)
def test_what_a_model_wrote_without_an_answer_is_not_given_the_gold_one(trace, tmp_path, monkeypatch):
    run(
        monkeypatch,
        "files",
        tmp_path / "made",
        "--from",
        write(tmp_path / "a.jsonl", [r | {"trace": trace} for r in ADDING]),
    )
    assert all("<answer>" not in row["response"] for row in read(tmp_path / "made" / "sft.jsonl"))
    counts = json.loads((tmp_path / "made" / "SOURCE.json").read_text())["counts"]
    assert counts["traces_without_an_answer"] == 20 and "traces_given_the_gold_answer" not in counts


@pytest.mark.parametrize("empty", [None, "", " "])
def test_a_trace_that_answers_nothing_is_not_given_the_gold_answer(empty, tmp_path, monkeypatch):
    rows = [garg(n) | {"reasoning_trace": "I add and then", "extracted_answer": empty} for n in range(20)]
    run(monkeypatch, "garg", tmp_path / "made", "--from", write(tmp_path / "a.jsonl", rows))
    assert {row["response"] for row in read(tmp_path / "made" / "sft.jsonl")} == {" I add and then"}
    assert json.loads((tmp_path / "made" / "SOURCE.json").read_text())["counts"]["traces_without_an_answer"] == 20


def test_a_validation_file_without_answers_is_not_replaced_by_a_part_of_the_training_file(
    tmp_path, monkeypatch, capsys
):
    training = write(tmp_path / "a.jsonl", [{"problem": r["problem"], "gold": r["answer"]} for r in ADDING[:10]])
    for name, rows, said in [
        ("b.jsonl", ADDING[10:], "--map answer=gold: no validation row has a column gold; there are answer, problem"),
        ("c.jsonl", [{"problem": r["problem"]} for r in ADDING[10:]], "no validation row has a column gold"),
        (
            "d.jsonl",
            [{"problem": r["problem"], "gold": None} for r in ADDING[10:]],
            "d.jsonl: no validation problem has",
        ),
    ]:
        arguments = ["--validation", write(tmp_path / name, rows), "--map", "answer=gold"]
        with pytest.raises(SystemExit):
            run(monkeypatch, "files", tmp_path / "made", "--from", training, *arguments)
        assert said in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "made").exists()


def test_several_files_first_filled_columns_and_levels_with_a_dot(tmp_path, monkeypatch):
    rows = [r | {"trace": "So.", "answer": None, "expected_answer": r["answer"], "level": "2.0"} for r in ADDING]
    rows += [rows[0] | {"expected_answer": "12"}]
    one, two = (tmp_path / name / "train.csv" for name in ("one", "two"))
    two.parent.mkdir()
    write(one, rows[:9])
    write(two, rows[9:])
    run(monkeypatch, "files", tmp_path / "made", "--from", one, "--from", two)
    found = read(tmp_path / "made" / "train.jsonl") + read(tmp_path / "made" / "validation.jsonl")
    assert len(found) == 20 and {row["level"] for row in found} == {"Level 2"}
    assert {row["problem"]: row["answer"] for row in found} == {r["problem"]: r["answer"] for r in ADDING}
    source = json.loads((tmp_path / "made" / "SOURCE.json").read_text())
    assert sorted(source["files"]) == ["one/train.csv", "two/train.csv"]
    assert source["counts"]["other_answers_to_the_same_problem"] == 1
    assert source["prompt_template"] == "r1_zero.prompt"


def test_one_problem_is_enough_to_train_on(tmp_path, monkeypatch):
    rows = [row | {"trace": "So."} for row in ADDING]
    training, validation = write(tmp_path / "a.jsonl", rows[:1]), write(tmp_path / "b.jsonl", rows[1:])
    run(monkeypatch, "files", tmp_path / "made", "--from", training, "--validation", validation)
    assert len(read(tmp_path / "made" / "sft.jsonl")) == 1


def test_a_template_with_windows_line_ends_serves_data_and_evaluation(tmp_path, monkeypatch):
    template = tmp_path / "own.prompt"
    template.write_bytes(b"Q: {question}\r\nA:\r\n")
    training = write(tmp_path / "a.jsonl", [gsm8k(number) for number in range(20)])
    run(monkeypatch, "gsm8k", tmp_path / "made", "--from", training, "--prompt-template", template)
    examples, found = load_examples(tmp_path / "made", str(template))
    assert found.fill("Why?") == "Q: Why?\nA:" and len(examples) == 16


def test_half_a_download_is_not_a_data_set(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    write(tmp_path / "cache" / "sft-reason" / "sft_gpt-oss-120b.jsonl", [garg(n) for n in range(20)])
    write(tmp_path / "cache" / "sft-reason" / "val.jsonl", [garg(n) for n in range(20, 25)])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "cache"))
    with pytest.raises(SystemExit):
        run(monkeypatch, "garg", tmp_path / "made")
    assert "there, or in the cache, is no sft-reason/train.jsonl;" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "made").exists()


def test_a_folder_that_can_t_be_written_is_named(tmp_path, monkeypatch, capsys):
    training = write(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "parts.parquet").mkdir()
    for folder, source, said in [
        (training / "made", training, "a.jsonl: "),
        (tmp_path / "loop" / "made", training, "a link that leads to itself"),
        (tmp_path / ("x" * 300), training, "File name too long"),
        (tmp_path / "made", tmp_path / "parts.parquet", "parts.parquet: is a folder; name the files in it"),
    ]:
        with pytest.raises(SystemExit):
            run(monkeypatch, "gsm8k", folder, "--from", source)
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_holds_something_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "sft.jsonl").write_text("mine")
    with pytest.raises(SystemExit):
        run(monkeypatch, "gsm8k", tmp_path / "made", "--from", write(tmp_path / "a.jsonl", GOOD))
    assert "made exists and is not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "made" / "sft.jsonl").read_text() == "mine"


# --- The hub -------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = "---\nlicense: mit\n---\n# A data set\n"


class Mirror(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: what a data set is, and its files; two that can't be had."""

    files: ClassVar[dict[str, bytes]] = {}

    def answer(self, status: int, content: bytes, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        if "gated" in self.path:
            self.answer(403, b"{}", X_Error_Code="GatedRepo")
        elif "/api/datasets/openai/gsm8k/tree" in self.path:
            entries = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in self.files.items()]
            self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        elif "/api/datasets/openai/gsm8k" in self.path:
            siblings = [{"rfilename": name} for name in self.files]
            about = {"id": "openai/gsm8k", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        elif name := next((n for n in self.files if self.path.endswith(f"/resolve/{COMMIT}/{n}")), None):
            etag = '"' + hashlib.sha256(self.files[name]).hexdigest() + '"'
            self.answer(200, self.files[name], ETag=etag, X_Repo_Commit=COMMIT)
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path):
    names = {"main/train-00000-of-00001.parquet": range(40), "main/test-00000-of-00001.parquet": range(40, 50)}
    files = {name: write(tmp_path / name, [gsm8k(n) for n in numbers]) for name, numbers in names.items()}
    Mirror.files = {name: path.read_bytes() for name, path in files.items()} | {"README.md": CARD.encode()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_the_hub_by_a_mirror_then_by_its_cache_alone(mirror, tmp_path):
    """In processes of their own: huggingface_hub reads its environment when it is imported."""
    here = {"HF_ENDPOINT": mirror, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}

    def command(*arguments, **environment) -> subprocess.CompletedProcess:
        line = [sys.executable, "-m", "lib.get_data", *map(str, arguments)]
        values = os.environ | here | environment
        return subprocess.run(line, env=values, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=120)

    missing = command("gsm8k", tmp_path / "none", HF_HUB_OFFLINE="1")
    assert missing.returncode == 2
    said = missing.stderr.splitlines()[-1]
    assert "openai/gsm8k can't be had from the hub" in said and "--from and --validation" in said
    found = command("gsm8k", tmp_path / "one")
    assert found.returncode == 0, found.stderr
    source = json.loads((tmp_path / "one" / "SOURCE.json").read_text())
    assert (source["repository"], source["revision"], source["licence"]) == ("openai/gsm8k", COMMIT, "mit")
    assert source["counts"] == {
        "sft": 36, "train": 40, "validation": 10,
        "without_answer": 0, "near_duplicates_of_validation": 0, "kept_for_tuning": 4,
    }  # fmt: skip
    offline = command("gsm8k", tmp_path / "two", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    for name in ("sft.jsonl", "train.jsonl", "validation.jsonl", "SOURCE.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for repo, words in {
        "some/gated": "some/gated is gated: accept its terms",
        "some/set": "there is no such data",
    }.items():
        failed = command("gsm8k", tmp_path / "none", "--repo", repo)
        assert failed.returncode == 2 and words in failed.stderr.splitlines()[-1]
    assert not (tmp_path / "none").exists()
