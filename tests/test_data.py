"""Examples, problems and templates: what is read, what is refused, and what 'n examples' means."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import mini_rows, write_rows

from lib.data import (
    Contamination,
    distinct,
    find_contamination,
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
    """7,500, less those of a trace, one without an answer, one that validation has too, and its near duplicates."""
    examples, _ = load_examples(MATH)
    validation = load_problems(MATH / "validation.jsonl")
    tuning = load_evaluation_problems(MATH, "tuning", examples)
    assert len(tuning) == 7295 and find_contamination(validation, tuning) == Contamination([], [])


@needs_math
def test_the_traces_of_math_are_clean_and_its_two_files_share_problems():
    """As a second route: the 4 exact ones are pairs that differ in white space, dollar signs and braces only."""
    examples, _ = load_examples(MATH)
    validation = load_problems(MATH / "validation.jsonl")
    assert find_contamination(examples, validation) == Contamination([], [])
    train = load_problems(MATH / "train.jsonl", may_lack_answers=True)
    found = find_contamination(train, validation)
    bare = {re.sub(r"[\s$\\,.{}?]", "", p.problem) for p in train}
    assert found.exact == [p.id for p in validation if re.sub(r"[\s$\\,.{}?]", "", p.problem) in bare]
    assert (len(found.exact), len(found.near)) == (4, 68)


@needs_math
def test_the_sizes_of_math():
    examples, template = load_examples(MATH)
    assert template.name == "r1_zero_blank_line"
    sizes = select_examples(examples, "all", True, 0).sizes
    assert (sizes["rows"], sizes["distinct"]) == (1767, 1710)
    rows = [json.loads(line) for line in (MATH / "sft.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sizes["distinct"] == len({(r["prompt"], r["response"]) for r in rows})
    assert len({e.problem for e in examples}) == 128
