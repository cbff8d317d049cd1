"""Examples, problems and templates: what is read, what is refused, and what 'n examples' means."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import mini_rows, write_rows

from lib.contamination import Contamination, find_contamination
from lib.data import (
    distinct,
    load_evaluation_problems,
    load_examples,
    load_problems,
    select_examples,
    stratified_subset,
)
from lib.files import UserError

MATH = Path(__file__).parents[2] / "shared" / "MATH"
needs_math = pytest.mark.skipif(not MATH.is_dir(), reason="the MATH data is not beside the project")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"line 3: not valid JSON"),
        ("[1, 2]", r"line 3: must be a JSON object"),
        ('{"prompt": "p"}', r"line 3: missing key 'response'"),
        ('{"prompt": "p", "response": ""}', r"line 3: 'response' must be a text that is not empty"),
        ('{"prompt": "p", "response": "  "}', r"line 3: 'response' must be a text that is not empty"),
        ('{"prompt": "p", "response": 5}', r"line 3: 'response' must be a text"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(data_dir, line, message):
    rows = (data_dir / "sft.jsonl").read_text().splitlines()
    (data_dir / "sft.jsonl").write_text("\n".join([*rows[:2], line, *rows[3:]]))
    with pytest.raises(UserError, match=r"sft\.jsonl, " + message):
        load_examples(data_dir)


def test_an_empty_file_is_refused(data_dir):
    (data_dir / "sft.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no rows"):
        load_examples(data_dir)


def test_the_template_is_found_in_the_data(data_dir):
    examples, template = load_examples(data_dir)
    assert template.name == "r1_zero"
    assert all(template.fill(e.problem) == e.prompt for e in examples)


def test_the_variant_with_an_empty_line_is_told_apart(data_dir):
    # MATH's own file has an empty line before 'User:'; evaluating with the usual template would measure another prompt.
    rows = mini_rows("sft.jsonl", 5)
    write_rows(data_dir / "sft.jsonl", [r | {"prompt": r["prompt"].replace("\nUser:", "\n\nUser:")} for r in rows])
    examples, template = load_examples(data_dir)
    assert template.name == "r1_zero_blank_line"
    assert template.fill(examples[0].problem) == examples[0].prompt


def test_prompts_of_two_templates_are_refused(data_dir):
    rows = mini_rows("sft.jsonl", 3)
    rows[2]["prompt"] = rows[2]["prompt"].replace("\nUser:", "\n\nUser:")
    write_rows(data_dir / "sft.jsonl", rows)
    with pytest.raises(UserError, match="row 3: the prompt differs from template r1_zero"):
        load_examples(data_dir)


def test_what_is_wrong_is_named_by_its_line_whatever_lines_are_empty(data_dir):
    rows = [json.dumps(row) for row in mini_rows("sft.jsonl", 2)]
    other = json.dumps({"prompt": "Q: 1?", "response": "2"})
    for lines, where in ((["", "", other], "line 3"), ([rows[0], "", "", rows[1], other], "line 5, row 3")):
        (data_dir / "sft.jsonl").write_text("\n".join(lines) + "\n")
        with pytest.raises(UserError, match=f"sft.jsonl, {where}: the prompt"):
            load_examples(data_dir)
    problems = [row | {"unique_id": "same"} for row in mini_rows("validation.jsonl", 2)]
    write_rows(data_dir / "validation.jsonl", problems)
    with pytest.raises(UserError, match=r"validation.jsonl, line 2: 'unique_id' is 'same', as .*line 1 has it"):
        load_problems(data_dir / "validation.jsonl")


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_template_that_ends_in_the_question_keeps_the_newline_of_its_prompts(end, data_dir, tmp_path):
    rows = [r | {"prompt": f"Q: {i}?{end}"} for i, r in enumerate(mini_rows("sft.jsonl", 3))]
    write_rows(data_dir / "sft.jsonl", rows)
    (tmp_path / "own.prompt").write_text("Q: {question}\n")
    examples, template = load_examples(data_dir, str(tmp_path / "own.prompt"))
    assert template.text == "Q: {question}" + end and examples[0].problem == "0?"


def test_a_template_of_the_users_own(data_dir, tmp_path):
    rows = [r | {"prompt": f"Q: {i}?\nA:"} for i, r in enumerate(mini_rows("sft.jsonl", 3))]
    write_rows(data_dir / "sft.jsonl", rows)
    with pytest.raises(UserError, match="none of the templates"):
        load_examples(data_dir)
    (tmp_path / "own.prompt").write_text("Q: {question}?\nA:")
    examples, template = load_examples(data_dir, str(tmp_path / "own.prompt"))
    assert [e.problem for e in examples] == ["0", "1", "2"] and template.name == "own"


def test_a_template_whose_prompts_end_in_a_newline(data_dir, tmp_path):
    rows = [r | {"prompt": f"Q: {i}?\nA:\n"} for i, r in enumerate(mini_rows("sft.jsonl", 3))]
    write_rows(data_dir / "sft.jsonl", rows)
    (tmp_path / "own.prompt").write_text("Q: {question}?\nA:\n")
    examples, template = load_examples(data_dir, str(tmp_path / "own.prompt"))
    assert [e.problem for e in examples] == ["0", "1", "2"] and template.fill("7") == "Q: 7?\nA:\n"


def test_an_empty_gold_answer_is_none(data_dir):
    rows = mini_rows("sft.jsonl", 40)
    write_rows(data_dir / "sft.jsonl", [rows[0] | {"ground_truth": " "}, *rows[1:]])
    examples, _ = load_examples(data_dir)
    assert [e.answer for e in examples] == [r["ground_truth"] for r in rows]


def test_ids_that_are_numbers_become_texts(data_dir):
    rows = mini_rows("validation.jsonl", 3)
    write_rows(data_dir / "validation.jsonl", [row | {"unique_id": i} for i, row in enumerate(rows)])
    assert [p.id for p in load_problems(data_dir / "validation.jsonl")] == ["0", "1", "2"]


def test_gold_answers_are_joined_through_the_problem(data_dir):
    rows = mini_rows("sft.jsonl", 40)
    write_rows(data_dir / "sft.jsonl", [{k: r[k] for k in ("prompt", "response")} for r in rows])
    examples, _ = load_examples(data_dir)
    assert [e.answer for e in examples] == [r["ground_truth"] for r in rows]


def test_filtering_needs_gold_answers(data_dir):
    rows = mini_rows("sft.jsonl", 3)
    write_rows(data_dir / "sft.jsonl", [{k: r[k] for k in ("prompt", "response")} for r in rows])
    write_rows(data_dir / "train.jsonl", mini_rows("validation.jsonl", 3))
    examples, _ = load_examples(data_dir)
    assert select_examples(examples, 2, False, 0).sizes["correct"] is None
    with pytest.raises(UserError, match="sft/1 has no 'ground_truth'"):
        select_examples(examples, 2, True, 0)


def test_of_two_copies_the_one_with_a_gold_answer_stays(data_dir):
    with_answer = mini_rows("sft.jsonl", 2)
    without = [{k: r[k] for k in ("prompt", "response")} for r in with_answer]
    write_rows(data_dir / "sft.jsonl", [*without, *with_answer])
    (data_dir / "train.jsonl").unlink(missing_ok=True)
    kept = distinct(load_examples(data_dir)[0])
    assert [e.answer for e in kept] == [r["ground_truth"] for r in with_answer]


def test_duplicates_count_once(data_dir):
    write_rows(data_dir / "sft.jsonl", mini_rows("sft.jsonl", 10) + mini_rows("sft.jsonl", 4))
    examples, _ = load_examples(data_dir)
    assert (len(examples), len(distinct(examples))) == (14, 10)
    sizes = select_examples(examples, "all", False, 0).sizes
    assert (sizes["rows"], sizes["distinct"], sizes["selected"]) == (14, 10, 10)


def test_subsets_are_nested_seeded_and_filtered(data_dir):
    examples, _ = load_examples(data_dir)
    small, large = (select_examples(examples, n, False, 3).examples for n in (7, 20))
    assert large[:7] == small
    assert select_examples(examples, 20, False, 3).examples == large
    assert select_examples(examples, 20, False, 4).examples != large
    chosen = select_examples(examples, "all", True, 3)
    assert 0 < chosen.sizes["correct"] == len(chosen.examples) < 40
    # the second route: the response's own text ends in the gold answer, in the course's form
    for e in chosen.examples:
        assert e.response.rstrip().endswith(f"</think> <answer> {e.answer} </answer>")


def test_a_subset_is_stratified_not_a_prefix(data_dir):
    write_rows(data_dir / "validation.jsonl", mini_rows("validation.jsonl", 1000))
    problems = load_problems(data_dir / "validation.jsonl")
    subset = stratified_subset(problems, 200, seed=1)
    assert len({p.id for p in subset}) == 200
    whole, part = (Counter((p.subject, p.level) for p in group) for group in (problems, subset))
    for stratum, count in whole.items():
        assert abs(part[stratum] - count / len(problems) * 200) <= 1
    assert stratified_subset(problems, 200, seed=1) == subset != stratified_subset(problems, 200, seed=2)


def test_tuning_problems_have_no_trace_and_are_not_validated_on(data_dir):
    examples, _ = load_examples(data_dir)
    validation = mini_rows("validation.jsonl", 24)
    write_rows(data_dir / "train.jsonl", mini_rows("train.jsonl", 3000) + validation[:2])
    tuning = {p.problem for p in load_evaluation_problems(data_dir, "tuning", examples)}
    assert tuning and not tuning & {e.problem for e in examples} and not tuning & {r["problem"] for r in validation}


def test_a_problem_without_an_answer_is_no_tuning_problem_and_no_validation_problem(data_dir):
    """MATH's own train.jsonl has one whose answer is empty; it can't be graded."""
    rows = mini_rows("train.jsonl", 3000)
    examples, _ = load_examples(data_dir)
    whole = load_evaluation_problems(data_dir, "tuning", examples)
    rows = [row | {"answer": " "} if row["unique_id"] == whole[0].id else row for row in rows]
    write_rows(data_dir / "train.jsonl", rows)
    assert load_evaluation_problems(data_dir, "tuning", examples) == whole[1:]
    write_rows(data_dir / "validation.jsonl", rows)
    with pytest.raises(UserError, match=r"validation\.jsonl, line \d+: 'answer' must be a text that is not empty"):
        load_evaluation_problems(data_dir, "validation", examples)


@needs_math
def test_the_tuning_problems_of_math():
    """7,500, less those of a trace, two without an answer, one that validation has too, and its near duplicates."""
    examples, _ = load_examples(MATH)
    validation = load_problems(MATH / "validation.jsonl")
    tuning = load_evaluation_problems(MATH, "tuning", examples)
    assert len(tuning) == 7306 and find_contamination(validation, tuning) == Contamination([], [])


@needs_math
def test_the_sizes_of_math():
    examples, template = load_examples(MATH)
    assert template.name == "r1_zero_blank_line"
    sizes = select_examples(examples, "all", True, 0).sizes
    assert (sizes["rows"], sizes["distinct"]) == (1767, 1710)
    rows = [json.loads(line) for line in (MATH / "sft.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sizes["distinct"] == len({(r["prompt"], r["response"]) for r in rows})
    assert len({e.problem for e in examples}) == 128


# --- values of another kind than a text: read in their evident sense, or refused with file, line and field

GOLD = [  # as JSON has it, and as it is read
    ("16", "16"),
    ("16.0", "16"),  # pandas writes a column of integers with a gap so
    ("-3", "-3"),
    ("0.5", "0.5"),
    ("1e-7", "0.0000001"),
    ("1e20", "100000000000000000000"),
    ('"16"', "16"),
    ('"nan"', "nan"),
    ('["16"]', "16"),
    ("[16]", "16"),
    ('["1/2", 0.5]', ["1/2", "0.5"]),
    ('["x", null, NaN, " "]', "x"),
    ("null", None),
    ("NaN", None),
    ('""', None),
    ('" \\n"', None),
    ("[]", None),
    ("[null]", None),
]
NO_ANSWER = ["true", "false", "Infinity", "-Infinity", '{"value": 16}', "{}", '[["16"]]', "[true]", '["1", {}]', "[[]]"]


def write_value(path, rows, key, value):
    """The rows, with `value` (JSON text) as the field of the second."""
    rows = [dict(row) for row in rows]
    rows[1][key] = "VALUE"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows).replace('"VALUE"', value))


@pytest.mark.parametrize(("value", "read"), GOLD)
@pytest.mark.parametrize("key", ["ground_truth", "answer"])
def test_gold_answers_of_traces_are_read_in_their_evident_sense(data_dir, key, value, read):
    rows = [
        {"prompt": r["prompt"], "response": r["response"], key: r["ground_truth"]} for r in mini_rows("sft.jsonl", 3)
    ]
    (data_dir / "train.jsonl").unlink()
    write_value(data_dir / "sft.jsonl", rows, key, value)
    examples, _ = load_examples(data_dir)
    assert [e.answer for e in examples] == [rows[0][key], read, rows[2][key]]


@pytest.mark.parametrize(("value", "read"), GOLD)
def test_answers_of_problems_are_read_in_the_same_sense(data_dir, value, read):
    rows = mini_rows("validation.jsonl", 3)
    for name in ("validation.jsonl", "train.jsonl"):
        write_value(data_dir / name, rows, "answer", value)
    if read is None:
        with pytest.raises(UserError, match=r"validation\.jsonl, line 2: 'answer' must be a text that is not empty"):
            load_problems(data_dir / "validation.jsonl")
        assert len(load_problems(data_dir / "train.jsonl", may_lack_answers=True)) == 2
    else:
        assert load_problems(data_dir / "validation.jsonl")[1].answer == read


@pytest.mark.parametrize("value", NO_ANSWER)
@pytest.mark.parametrize(
    ("name", "key"), [("sft.jsonl", "ground_truth"), ("sft.jsonl", "answer"), ("validation.jsonl", "answer")]
)
def test_what_is_no_answer_is_refused(data_dir, name, key, value):
    rows = [{k: v for k, v in row.items() if k != "ground_truth"} for row in mini_rows(name, 3)]
    write_value(data_dir / name, rows, key, value)
    with pytest.raises(UserError, match=rf"{name}, line 2: '{key}' must be a text or a number, not "):
        load_examples(data_dir) if name == "sft.jsonl" else load_problems(data_dir / name)


@pytest.mark.parametrize("value", ["5", "0.5", "null", "NaN", "Infinity", "true", '["p"]', "[]", "{}", '""', '" "'])
@pytest.mark.parametrize(
    ("name", "key"),
    [("sft.jsonl", "prompt"), ("sft.jsonl", "response"), ("train.jsonl", "problem"), ("validation.jsonl", "problem")],
)
def test_prose_is_a_text(data_dir, name, key, value):
    write_value(data_dir / name, mini_rows(name, 3), key, value)
    with pytest.raises(UserError, match=rf"{name}, line 2: '{key}' must be a text that is not empty"):
        load_examples(data_dir) if name == "sft.jsonl" else load_problems(data_dir / name)


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("level", "3", "Level 3"),
        ("level", "3.0", "Level 3"),
        ("level", '"3"', "Level 3"),
        ("level", '"Level 3"', "Level 3"),
        ("level", '"Level ?"', "Level ?"),
        ("level", "null", None),
        ("level", "NaN", None),
        ("level", '""', None),
        ("subject", '"Algebra"', "Algebra"),
        ("subject", "2", "2"),
        ("subject", "null", None),
        ("subject", '" "', None),
        ("unique_id", "7", "7"),
        ("unique_id", "7.0", "7"),
        ("unique_id", '"a/b"', "a/b"),
        ("unique_id", "null", "validation/1"),
        ("unique_id", "NaN", "validation/1"),
        ("unique_id", "1" + 400 * "0", "1" + 400 * "0"),
    ],
)
def test_labels_are_read_in_their_evident_sense(data_dir, key, value, read):
    write_value(data_dir / "validation.jsonl", mini_rows("validation.jsonl", 3), key, value)
    problem = load_problems(data_dir / "validation.jsonl")[1]
    assert getattr(problem, "id" if key == "unique_id" else key) == read


@pytest.mark.parametrize("value", ["true", "Infinity", '["a"]', "[]", "{}", '{"a": 1}'])
@pytest.mark.parametrize("key", ["level", "subject", "unique_id"])
def test_what_is_no_label_is_refused(data_dir, key, value):
    write_value(data_dir / "validation.jsonl", mini_rows("validation.jsonl", 3), key, value)
    with pytest.raises(UserError, match=rf"validation\.jsonl, line 2: '{key}' must be a text or a number, not "):
        load_problems(data_dir / "validation.jsonl")


def test_one_of_several_gold_answers_is_enough(data_dir):
    rows = mini_rows("sft.jsonl", 3)
    write_rows(data_dir / "sft.jsonl", [r | {"ground_truth": ["no such answer", r["ground_truth"]]} for r in rows])
    examples, _ = load_examples(data_dir)
    write_rows(data_dir / "sft.jsonl", rows)
    plain, _ = load_examples(data_dir)
    sizes = [select_examples(e, "all", False, 0).sizes for e in (examples, plain)]
    assert sizes[0] == sizes[1] and sizes[0]["correct"] > 0


def test_data_without_levels_subjects_and_ids(data_dir):
    rows = [{k: r[k] for k in ("problem", "answer")} for r in mini_rows("validation.jsonl", 1000)]
    write_rows(data_dir / "validation.jsonl", rows)
    problems = load_problems(data_dir / "validation.jsonl")
    assert problems[7].id == "validation/7" and {(p.level, p.subject) for p in problems} == {(None, None)}
    subset = stratified_subset(problems, 100, seed=1)
    assert len({p.id for p in subset}) == 100 and subset == stratified_subset(problems, 100, seed=1)
    assert subset != stratified_subset(problems, 100, seed=2) and subset != problems[:100]
    with_levels = load_problems(write_rows(data_dir / "other.jsonl", mini_rows("validation.jsonl", 50)))
    assert len(stratified_subset([*problems[50:100], *with_levels], 20, seed=1)) == 20


# --- files as other programs write them


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"\xef\xbb\xbf" + content,
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: content.removesuffix(b"\n"),
        lambda content: b"\n" + content.replace(b"\n", b"\n\n"),
    ],
)
def test_files_of_other_editors_are_read(data_dir, change):
    expected = load_examples(data_dir), load_problems(data_dir / "validation.jsonl")
    for path in data_dir.glob("*.jsonl"):
        path.write_bytes(change(path.read_bytes()))
    assert (load_examples(data_dir), load_problems(data_dir / "validation.jsonl")) == expected


@pytest.mark.parametrize("name", ["sft.jsonl", "validation.jsonl", "train.jsonl"])
def test_a_file_that_is_no_text_is_named(data_dir, name):
    rows = mini_rows(name, 3)
    rows[2] |= {"subject": "Géométrie", "ground_truth": "é"}
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    load = load_examples if name == "sft.jsonl" else lambda folder: load_problems(folder / name)
    for content, message in (
        (text.encode("latin-1"), "line 3: byte 0xe9 is not UTF-8"),
        (text.encode("utf-16"), "is UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (text.replace("é", "\\udce9").encode(), r"line 3: \\udce9 is half of a surrogate pair"),
    ):
        (data_dir / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{re.escape(name)}.*{message}"):
            load(data_dir)


# --- templates

FEW_SHOT = (
    "User: What is $1 + 1$?\nAssistant: <think> 1 + 1 = 2. </think> <answer> 2 </answer>\n\n"
    "User: Simplify $\\frac{2}{4}$ {exactly}.\nAssistant: <think> Halve. </think> <answer> \\frac{1}{2} </answer>\n\n"
    "User: {question}\nAssistant: <think>"
)


@pytest.mark.parametrize("ends", ["", "\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_few_shot_template(data_dir, tmp_path, ends, mark):
    """Its worked examples look like the question, and one problem quotes the template's own words."""
    problems = ["What is $2 + 2$?", "User: 3\nAssistant: <think>", "Simplify {x} and {question}."]
    rows = [{"prompt": FEW_SHOT.replace("{question}", p), "response": " 4 </think>", "answer": "4"} for p in problems]
    write_rows(data_dir / "sft.jsonl", rows)
    text = FEW_SHOT.replace("\n", ends or "\n") + ends
    (tmp_path / "few-shot.prompt").write_bytes((mark + text).encode())
    examples, template = load_examples(data_dir, str(tmp_path / "few-shot.prompt"))
    assert [e.problem for e in examples] == problems
    assert [template.fill(p) for p in problems] == [row["prompt"] for row in rows]


def test_a_template_asks_once(data_dir, tmp_path):
    for text in ("", "no place for it", "{question} and {question}", "{ question }"):
        (tmp_path / "own.prompt").write_text(text)
        with pytest.raises(UserError, match=r"prompt_template own: must hold \{question\} exactly once"):
            load_examples(data_dir, str(tmp_path / "own.prompt"))


@pytest.mark.parametrize("level", ["Level 2", "2", " 2 ", "2.0", "2.", 2, 2.0])
def test_a_level_is_named_as_math_does(level, data_dir):
    write_rows(data_dir / "validation.jsonl", [{"problem": "1+1?", "answer": "2", "level": level}])
    assert load_problems(data_dir / "validation.jsonl")[0].level == "Level 2"


def test_nothing_is_tuned_on_a_near_duplicate_of_validation(data_dir):
    examples, _ = load_examples(data_dir)
    validation = mini_rows("validation.jsonl", 24)
    near = [
        row | {"problem": "Solve this: " + row["problem"], "unique_id": f"near/{i}"} for i, row in enumerate(validation)
    ]
    whole = load_evaluation_problems(data_dir, "tuning", examples)
    write_rows(data_dir / "train.jsonl", mini_rows("train.jsonl", 3000) + near[:5])
    assert load_evaluation_problems(data_dir, "tuning", examples) == whole
