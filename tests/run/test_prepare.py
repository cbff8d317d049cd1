"""What a run reads and checks before it starts, and what it has to give back if that fails."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from conftest import write_rows

from lib.evaluation.evaluate import Evaluation
from lib.files import UserError, read_lines
from lib.run import life_cycle, lock
from lib.run import prepare as preparing
from lib.run.evaluations import finish_evaluation
from lib.run.prepare import prepare
from lib.settings import resolve


@pytest.fixture
def doubled(data_dir):
    """A validation set of which one problem has a trace, word by word, and one but for a word."""
    trace = read_lines(data_dir / "sft.jsonl")[0]
    text = next(row["problem"] for row in read_lines(data_dir / "train.jsonl") if row["problem"] in trace["prompt"])
    rows = read_lines(data_dir / "validation.jsonl")
    rows[3]["problem"] = text
    write_rows(data_dir / "validation.jsonl", rows)
    return rows[3].get("unique_id", "validation/3")


def test_doubles_of_traces_are_counted_and_left_out_where_that_is_asked_for(parameters, doubled):
    run = prepare(resolve(parameters))
    found = run.sizes["contamination"]
    assert found["exact"] == 1 and doubled in found["ids"] and found["excluded"] is False
    assert run.sizes["validation"] == 24 and doubled in {p.id for p in run.problems}
    clean = prepare(resolve(parameters | {"exclude_contaminated": True}))
    assert clean.sizes["contamination"] == found | {"excluded": True}
    assert clean.sizes["validation"] == 24 - len(found["ids"]) and doubled not in {p.id for p in clean.problems}


def test_the_same_problems_are_left_out_for_every_n(parameters, doubled):
    """Runs of one study are compared on the same problems, and share their base."""
    few, many = (prepare(resolve(parameters | {"n": n, "exclude_contaminated": True})) for n in (1, "all"))
    assert [p.id for p in few.problems] == [p.id for p in many.problems]


@pytest.fixture
def workers(monkeypatch):
    """The engine's processes, as `start_replicas` would start them on a GPU."""
    started, closed = [], []

    def start_replicas(*places):
        started.append(places)
        return [SimpleNamespace(close=lambda: closed.append("one")) for _ in range(3)]

    monkeypatch.setattr(preparing, "start_replicas", start_replicas)
    return SimpleNamespace(started=started, closed=closed)


def test_processes_of_the_engine_start_first_and_become_the_engine(parameters, workers, monkeypatch):
    given = {}
    monkeypatch.setattr(preparing, "begin_vllm", lambda *_, replicas, **__: given.update(replicas=replicas))
    monkeypatch.setattr(life_cycle, "wait_until_ready", lambda engine: None)
    config = resolve(parameters | {"engines": 3})
    assert prepare(config).replicas == [] and not workers.started  # tuning prepares many runs
    run = prepare(config, start_workers=True)
    assert workers.started == [("cpu", "cpu", 3)] and len(run.replicas) == 3
    life_cycle.start(run)
    assert len(given["replicas"]) == 3 and run.replicas == [] and not workers.closed
    lock.release(run.config.run_dir)


def test_processes_of_the_engine_end_with_a_run_that_does_not_start(parameters, workers, monkeypatch):
    with pytest.raises(UserError, match="n=99"):
        prepare(resolve(parameters | {"n": 99}), start_workers=True)
    assert len(workers.closed) == 3
    run = prepare(resolve(parameters), start_workers=True)
    (run.config.run_dir / "thesis.tex").parent.mkdir(parents=True)
    (run.config.run_dir / "thesis.tex").write_text("not ours")
    with pytest.raises(UserError, match="holds files that no run wrote"):
        life_cycle.start(run)
    assert len(workers.closed) == 6 and not (run.config.run_dir / lock.NAME).exists()
    (run.config.run_dir / "thesis.tex").unlink()
    run = prepare(resolve(parameters), start_workers=True)
    monkeypatch.setattr(life_cycle, "load_policy", lambda *_: 1 / 0)
    monkeypatch.setattr(life_cycle, "start_engine", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        life_cycle.start(run)
    assert len(workers.closed) == 9


def test_several_samples_a_problem_at_the_start_and_the_end(parameters):
    from lib.run.run import samplings_of

    config = resolve(parameters | {"samples_per_problem": 4, "greedy": "always"})
    assert {name: s.samples for name, s in samplings_of(config, final=True).items()} == {"sampled": 4, "greedy": 1}
    assert {name: s.samples for name, s in samplings_of(config, final=False).items()} == {"sampled": 1, "greedy": 1}
    config = resolve(parameters | {"samples_per_problem": 4, "greedy": "never"})
    assert list(samplings_of(config, final=True)) == ["sampled"]


@pytest.mark.parametrize("number", [0, 3, None])
def test_responses_are_written_without_their_text_but_for_some_problems(parameters, number):
    """Counts stay, and every evaluation keeps the text of the same problems."""
    run = prepare(resolve(parameters | {"keep_responses": number, "log_generations": 0, "n_val": 12}))
    records = [
        {
            "id": p.id, "sample": 0, "subject": p.subject, "level": p.level, "response": f"text of {p.id}", "tokens": 2,
            "format": True, "correct": i % 3 == 0, "undecided": False, "lenient": True, "token_entropy": None,
            "verdict": "correct" if i % 3 == 0 else "wrong",
        }
        for i, p in enumerate(run.problems)
    ]  # fmt: skip
    written, answers = [], Future()
    answers.set_result({"sampled": Evaluation(records, [], [], {"generate": 1.0})})
    run.tracker = SimpleNamespace(log_evaluation=lambda parts: written.extend(parts) or [line for line, _ in parts])
    run.pending = {"train_step": 0, "epoch": 0.0, "examples_seen": 0}, {"sync": 0.1, "proof": None}, answers
    full, subset = finish_evaluation(run)
    assert (full["n"], full["correct"], subset["n"]) == (24, 8, 12)
    texts = [{r["id"]: r["response"] for r in part if r["response"] is not None} for _, part in written]
    assert [len(part) for _, part in written] == [24, 12]
    assert [len(kept) for kept in texts] == ([24, 12] if number is None else [number, number])
    assert all(text == f"text of {name}" for kept in texts for name, text in kept.items())
    assert texts[1].keys() <= texts[0].keys()
