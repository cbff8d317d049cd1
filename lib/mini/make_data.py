"""Writes `lib/mini/data`: traces, training problems and validation problems. Run: python -m lib.mini.make_data.

The same seed gives the same bytes; a test makes them again and compares. Training and validation problems come from
the same 35 families: validation asks for nothing that training doesn't teach. No validation problem equals a training
problem up to its numbers, nor up to its names, letters and other exchangeable words.
"""

import json
import random
from collections import Counter
from itertools import count, cycle
from pathlib import Path

from lib.mini import teacher
from lib.mini.family import LEVELS, Worked, make_exam_problem
from lib.mini.problems import FAMILIES

SEED = 336
TRACES = 2048
PER_CELL_TRAIN, PER_CELL_VALIDATION = 15, 6  # problems for each pair of a family and a level
ATTEMPTS = 3000  # to find a problem of a family and level that training doesn't have
DATA = Path(__file__).parent / "data"
PROMPT = Path(__file__).parents[1] / "prompts" / "r1_zero.prompt"


def make_problems(held_out: bool, per_cell: int, rng: random.Random) -> list[Worked]:
    """Distinct problems, `per_cell` for each family and level, in random order."""
    problems, seen = [], set()
    for family in FAMILIES:
        for level in LEVELS:
            wanted = len(problems) + per_cell
            while len(problems) < wanted:
                worked = make_exam_problem(family, level, rng, held_out)
                if worked.problem not in seen:
                    seen.add(worked.problem)
                    problems.append(worked)
    rng.shuffle(problems)
    return problems


def replace_twins(problems: list[Worked], train: list[Worked], rng: random.Random) -> list[Worked]:
    """Another problem for each that equals one of `train` but for names, letters and other exchangeable words.

    It is of the same family and level, or where `train` has all of these, of the same subject and level.
    """
    taken, seen = {worked.kernel for worked in train}, {worked.problem for worked in problems}
    replaced = []
    for old in problems:
        new, own = old, [family for family in FAMILIES if family.name == old.family]
        near = [family for family in FAMILIES if family.subject == old.subject]
        for attempt in count():
            if new.kernel not in taken and (new is old or new.problem not in seen):
                break
            new = make_exam_problem(rng.choice(own if attempt < ATTEMPTS else near), old.level, rng, held_out=True)
        seen.add(new.problem)
        replaced.append(new)
    return replaced


def problem_rows(problems: list[Worked], split: str) -> list[dict[str, str]]:
    """The problems in the fields of MATH."""
    rows, counts = [], Counter()
    for worked in problems:
        folder = worked.subject.lower().replace(" & ", "_and_").replace(" ", "_")
        rows.append(
            {
                "problem": worked.problem,
                "level": f"Level {worked.level}",
                "subject": worked.subject,
                "unique_id": f"{split}/{folder}/{counts[folder]}.json",
                "answer": worked.answer,
            }
        )
        counts[folder] += 1
    return rows


def balanced(problems: list[Worked], count: int) -> list[Worked]:
    """`count` of the problems, one of each subject in turn, so that every prefix is balanced over subjects."""
    queues: dict[str, list[Worked]] = {}
    for worked in problems:
        queues.setdefault(worked.subject, []).append(worked)
    turn = cycle(sorted(queues))
    return [queues[next(turn)].pop() for _ in range(count)]


def trace_rows(problems: list[Worked], rng: random.Random) -> list[dict[str, str]]:
    """One trace for each problem, in the fields of MATH's sft.jsonl."""
    template = PROMPT.read_text(encoding="utf-8")
    return [
        {
            "prompt": template.replace("{question}", worked.problem),
            "response": teacher.write(worked, kind, rng),
            "ground_truth": worked.answer,
        }
        for worked, kind in zip(problems, teacher.kinds(len(problems), rng), strict=True)
    ]


def make_splits(rng: random.Random) -> tuple[list[Worked], list[Worked], list[Worked]]:
    """(train, validation, traced): all problems, and those of train that the teacher writes traces for."""
    train = make_problems(False, PER_CELL_TRAIN, rng)
    validation = make_problems(True, PER_CELL_VALIDATION, rng)
    validation = replace_twins(validation, train, random.Random(SEED + 1))  # the traces' own numbers stay as they were
    traced = balanced(train, TRACES)
    rng.shuffle(traced)
    return train, validation, traced


def make_files() -> dict[str, str]:
    """File name -> contents."""
    rng = random.Random(SEED)
    train, validation, traced = make_splits(rng)
    rows = {
        "sft.jsonl": trace_rows(traced, rng),
        "train.jsonl": problem_rows(train, "train"),
        "validation.jsonl": problem_rows(validation, "validation"),
    }
    return {name: "".join(json.dumps(row) + "\n" for row in content) for name, content in rows.items()}


def main() -> None:
    DATA.mkdir(exist_ok=True)
    for name, text in make_files().items():
        (DATA / name).write_text(text, encoding="utf-8")
        print(f"{name}: {text.count(chr(10))} rows, {len(text.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
