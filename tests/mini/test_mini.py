"""`mini`: the data can be made again, nothing leaks, every answer is right, the teacher is as noisy as it says."""

import itertools
import json
import math
import random
import re
from collections import Counter
from fractions import Fraction

import pytest
import sympy

from lib.contamination import Contamination, find_contamination
from lib.data import load_examples, load_problems
from lib.grading import r1_zero_reward_fn
from lib.mini import make_data, teacher, textbook
from lib.mini.counting import GROUPS
from lib.mini.family import LEVELS, SUBJECTS
from lib.mini.latex import ASK, THINGS
from lib.mini.pretrain import MODEL
from lib.mini.problems import FAMILIES
from lib.mini.tokenizer import END, make_tokenizer


def read(name):
    return [json.loads(line) for line in (make_data.DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def traces():
    return read("sft.jsonl")


@pytest.fixture(scope="module")
def train():
    return read("train.jsonl")


@pytest.fixture(scope="module")
def validation():
    return read("validation.jsonl")


@pytest.fixture(scope="module")
def worked():
    """(train, validation, traced) with the worked steps, which the files leave out."""
    return make_data.make_splits(random.Random(make_data.SEED))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def question(trace):
    return trace["prompt"].split("\nUser: ")[1].removesuffix("\nAssistant: <think>")


# --- the files


def test_files_are_made_again_byte_for_byte():
    for name, text in make_data.make_files().items():
        assert (make_data.DATA / name).read_bytes() == text.encode(), f"{name}: run python -m lib.mini.make_data"


def test_fields_are_those_of_math(traces, train, validation):
    assert {tuple(row) for row in traces} == {("prompt", "response", "ground_truth")}
    assert {tuple(row) for row in train + validation} == {("problem", "level", "subject", "unique_id", "answer")}


def test_enough_of_everything_and_nothing_twice(traces, train, validation):
    assert len(traces) >= 2048 and len(validation) >= 1000
    assert (
        len({question(row) for row in traces})
        == len({row["response"] + row["prompt"] for row in traces})
        == len(traces)
    )
    assert len({row["problem"] for row in train + validation}) == len(train) + len(validation)
    assert len({row["unique_id"] for row in train + validation}) == len(train) + len(validation)


def test_traces_are_about_training_problems_and_leave_some_for_tuning(traces, train):
    answers = {row["problem"]: row["answer"] for row in train}
    assert all(answers[question(row)] == row["ground_truth"] for row in traces)
    assert len(train) - len(traces) >= 500


def test_subjects_and_levels_are_balanced_and_shuffled(traces, train, validation):
    for rows in (train, validation):
        cells = Counter((row["subject"], row["level"]) for row in rows)
        assert set(cells) == {(subject, f"Level {level}") for subject in SUBJECTS for level in LEVELS}
        assert len(set(cells.values())) == 1
    subject = {row["problem"]: row["subject"] for row in train}
    first = Counter(row["subject"] for row in validation[:200])
    assert len(first) == 7 and max(first.values()) < 60
    assert max(Counter(subject[question(row)] for row in traces).values()) <= len(traces) / 7 + 1


# --- leakage


def mask(text):
    """The text with all that a renaming of numbers can change taken out: digits, signs before them, spaces."""
    return re.sub(r"[-+]?\d+", "#", text.replace(" ", ""))


def test_mask_sees_through_renamed_numbers():
    assert mask("Solve $3x + 4 = 19$.") == mask("Solve $12x - 5 = -7$.") != mask("Solve $3y + 4 = 19$.")


def test_no_validation_problem_up_to_numbers_is_in_the_training_files(traces, train, validation):
    held_out = {mask(row["problem"]) for row in validation}
    assert held_out.isdisjoint(mask(row["problem"]) for row in train)
    assert held_out.isdisjoint(mask(question(row)) for row in traces)


NAMELESS = (r"\b[A-Z][a-z]*\b|\b[A-Z]{2,}\b", *(rf"\b({'|'.join(words)})\b" for words in (THINGS, GROUPS, ASK)))


def nameless(text):
    """The text without what a renaming can change: people, shapes, things, groups, verbs and single letters."""
    text = re.sub(r"(?<![a-z\\])[a-z](?![a-z])", "@", text)
    for pattern in NAMELESS:
        text = re.sub(pattern, "@", text)
    return text


def test_nameless_sees_through_names_but_not_numbers():
    one = "Ben gives $3$ of $x$ cards to the club."
    assert nameless(one) == nameless("Anna gives $3$ of $y$ books to the choir.")
    assert nameless(one) != nameless("Anna gives $4$ of $y$ books to the choir.")


def test_no_validation_problem_up_to_names_is_in_the_training_files(traces, train, validation):
    """Once 27 of 1,050 equalled a trace's problem but for people's names, and 156 but for some exchangeable word."""
    known = {nameless(row["problem"]) for row in train} | {nameless(question(row)) for row in traces}
    assert not [row["problem"] for row in validation if nameless(row["problem"]) in known]
    examples, _ = load_examples(make_data.DATA)
    problems = load_problems(make_data.DATA / "validation.jsonl")
    for seen in (examples, load_problems(make_data.DATA / "train.jsonl")):
        assert find_contamination(seen, problems) == Contamination([], [])


def test_no_validation_problem_up_to_numbers_is_in_the_pretraining_text(validation):
    rng = random.Random(2024)  # not the seed of the training: any text of the generator must be clean
    text = mask("\n".join(textbook.document(rng) for _ in range(20_000)))
    assert not [row["problem"] for row in validation if mask(row["problem"]) in text]
    planted = textbook.exercise(rng)[0].problem  # the search does find what is there
    assert mask(planted.replace("2", "7")) in text


def test_pretraining_text_has_no_tag_of_the_prompt():
    rng = random.Random(2025)
    text = "\n".join(textbook.document(rng) for _ in range(20_000))
    assert "<td>" in text and not re.search("</?(think|answer)", text)
    assert "User:" not in text and "Assistant:" not in text


# --- answers, by a second route: read the numbers out of the question and try, count or hand them to sympy


def numbers(text):
    return [int(number) for number in re.findall(r"-?\d+", text)]


def value(expression, **variables):
    """A formula of the questions as a number: implicit products, ^, \\cdot."""
    text = expression.replace(r"\cdot", "*").replace("^", "**").replace("{", "").replace("}", "")
    text = re.sub(r"(?<=[\d)])\s*(?=[a-zA-Z(])", "*", text)
    return eval(text, {"__builtins__": {}}, variables)


def formulas(text):
    return re.findall(r"\$([^$]*)\$", text)


def rule_of(text, pattern):
    """(letter, formula) of the first formula that matches `pattern`."""
    return next(match.groups() for formula in formulas(text) if (match := re.fullmatch(pattern, formula)))


def entries(text):
    """The entries of every matrix in the text, row by row."""
    return [numbers(block) for block in re.findall(r"\\begin{pmatrix}(.*?)\\end{pmatrix}", text)]


def linear_equation(text):
    equation = next(formula for formula in formulas(text) if "=" in formula)
    left, right = equation.split(" = ")
    letter = re.search("[a-z]", left)[0]
    return next(n for n in range(-99, 100) if value(left, **{letter: n}) == value(right, **{letter: n}))


def slope(text):
    (x1, y1), (x2, y2) = re.findall(r"\((-?\d+),(-?\d+)\)", text)
    return sympy.Line((int(x1), int(y1)), (int(x2), int(y2))).slope


def function_value(text):
    letter, formula = rule_of(text, r"\w\(([a-z])\) = (.*)")
    at = numbers(re.search(r"\$\w\((-?\d+)\)\$|\$\w = (-?\d+)\$", text)[0])[0]
    return value(formula, **{letter: at})


def system(text):
    total, difference = numbers(text)
    return next((x, y) for x in range(-99, 100) for y in range(-99, 100) if x + y == total and x - y == difference)


def absolute(text):
    shown = next(formula for formula in formulas(text) if "|" in formula)
    letter, inside, sign, bound = re.fullmatch(r"\|(([a-z]).*)\| (<|\\le) (\d+)", shown).group(2, 1, 3, 4)
    inner = [n for n in range(-200, 200) if abs(value(inside, **{letter: n})) <= int(bound)]
    left, right = "[]" if sign == r"\le" else "()"
    return f"{left}{inner[0]},{inner[-1]}{right}"


def percent(text):
    share = int(re.search(r"\$(\d+)\\%\$", text)[1])
    whole = int(re.search(r"\$(\d+)\$", text)[1])
    return Fraction(share, 100) * whole


def fraction_sum(text):
    sign = re.search(r"} ([-+]) \\frac", text)[1]
    first, second = (sympy.Rational(*map(int, pair)) for pair in re.findall(r"\\frac{(\d+)}{(\d+)}", text))
    return first + second if sign == "+" else first - second


def operations(text):
    return value(next(formula for formula in formulas(text) if re.search(r"\d", formula)).split(" = ")[-1])


def change(text):
    paid, price = sorted((int(n) for n in re.findall(r"\$\\\$(\d+)\$", text)), reverse=True)
    count = int(re.search(r"(?<!\\)\$(\d+)\$", text)[1])
    for _ in range(count):
        paid -= price
    return paid


def average(text):
    listed = numbers(next(formula for formula in formulas(text)))
    return sympy.Rational(sum(listed), len(listed))


def remainder(text):
    listed = [n for n in numbers(text) if n]
    return next(rest for rest in range(99) if (max(listed) - rest) % listed[-1] == 0)


def greatest(text):
    a, b = numbers(text)
    return max(n for n in range(1, b + 1) if a % n == b % n == 0)


def least(text):
    a, b = numbers(text)
    return next(n for n in itertools.count(1) if n % a == n % b == 0)


def base(text):
    found = re.search(r"(\d+)_{(\d)}", text) or re.search(r"\$(\d+)\$ in base \$(\d)\$", text)
    return int(found[1], int(found[2]))


def divisors(text):
    (number,) = numbers(text)
    return sum(number % n == 0 for n in range(1, number + 1))


def committee(text):
    k, n = sorted(numbers(text))
    return sum(1 for _ in itertools.combinations(range(n), k))


def offices(text):
    k, n = sorted(numbers(text))
    return sum(1 for _ in itertools.permutations(range(n), k))


def chance(text):
    bag = dict(re.findall(r"\$(\d+)\$ (?=(\w+))", text))
    wanted = re.search(r"(red|blue|green|yellow|gold)", text)[1]
    counts = {colour: int(count) for count, colour in bag.items()}
    if len(counts) != len(re.findall(r"\$\d+\$ \w+", text)):  # two colours of one count
        counts = {colour: int(count) for count, colour in re.findall(r"\$(\d+)\$ (\w+)", text)}
    return sympy.Rational(counts[wanted], sum(counts.values()))


def outfits(text):
    return sum(1 for _ in itertools.product(*map(range, numbers(text))))


def overlap(text):
    total, a, b, both = numbers(text)
    return total - len(set(range(a)) | set(range(a - both, a - both + b)))


def rectangle(text):
    perimeter, side = numbers(text)
    return side * next(width for width in range(1, 99) if 2 * (side + width) == perimeter)


def hypotenuse(text):
    a, b = numbers(text)
    return sympy.Point(0, 0).distance(sympy.Point(a, b))


def angle(text):
    first, second = numbers(text)
    return next(third for third in range(1, 180) if first + second + third == 180)


def circle(text):
    return sympy.Circle(sympy.Point(0, 0), sympy.Rational(numbers(text)[0], 2)).area


def box(text):
    a, b, c = numbers(text)
    return sum(2 * p * q for p, q in itertools.combinations((a, b, c), 2))


def quadratic(text):
    formula = next(formula for formula in formulas(text) if "^2" in formula and "r^2 + s" not in formula)
    formula = formula.split(" = ")[-1] if formula.startswith("y =") else formula.removesuffix(" = 0")
    return re.search("[a-z]", formula)[0], formula


def roots(text):
    letter, formula = quadratic(text)
    found = [n for n in range(-60, 61) if value(formula, **{letter: n}) == 0]
    return (found[0], found[-1])


def vieta(text):
    letter, formula = quadratic(text)
    zero = sympy.Poly(sympy.sympify(value(formula, **{letter: sympy.Symbol(letter)})))
    return sympy.simplify(sum(root**2 * times for root, times in sympy.roots(zero).items()))


def sequence(text):
    shown = numbers(next(formula for formula in formulas(text) if formula.count(",") >= 2))
    terms = shown[:3]
    index = next(n for formula in formulas(text) if (n := re.fullmatch(r"(?:\w_{)?(\d+)}?", formula)))[1]
    while len(terms) < int(index):
        terms.append(2 * terms[-1] - terms[-2])
    return terms[-1]


def vertex(text):
    letter, formula = quadratic(text)
    heights = {n: value(formula, **{letter: n}) for n in range(-50, 51)}
    at = min(heights, key=heights.get)
    return (at, heights[at])


def composition(text):
    named = {f[0]: (f[2], f.split(" = ")[1]) for f in formulas(text) if " = " in f}
    outer, inner, at = re.search(r"\$(\w)\((\w)\((-?\d+)\)\)\$", text).groups()
    letter, formula = named[inner]
    between = value(formula, **{letter: int(at)})
    letter, formula = named[outer]
    return value(formula, **{letter: between})


def dot(text):
    first, second = entries(text)
    return sympy.Matrix(first).dot(sympy.Matrix(second))


def determinant(text):
    ((a, b, c, d),) = entries(text)
    return sympy.Matrix([[a, b], [c, d]]).det()


def complex_product(text):
    pairs = re.findall(r"(-?\d+) ([-+]) (\d*)i", text.replace("a + bi", ""))
    first, second = (complex(int(a), int(f"{sign}{b or 1}")) for a, sign, b in pairs)
    product = first * second
    return sympy.Integer(int(product.real)) + sympy.Integer(int(product.imag)) * sympy.I


def length(text):
    (vector,) = entries(text)
    return sympy.Matrix(vector).norm()


def radians(text):
    (degrees,) = numbers(text)
    return sympy.rad(degrees)


CHECKS = {
    family.name: check
    for family, check in zip(
        FAMILIES,
        (
            *(linear_equation, slope, function_value, system, absolute),
            *(committee, offices, chance, outfits, overlap),
            *(rectangle, hypotenuse, angle, circle, box),
            *(roots, vieta, sequence, vertex, composition),
            *(remainder, greatest, least, base, divisors),
            *(percent, fraction_sum, operations, change, average),
            *(dot, determinant, complex_product, length, radians),
        ),
        strict=True,
    )
}


def same(answer, expected):
    """Whether the LaTeX answer is the expected interval, pair or number."""
    if isinstance(expected, str):
        return answer == expected
    if isinstance(expected, tuple):
        return answer == f"({expected[0]},{expected[1]})"
    text = re.sub(r"\\frac{([^}]*)}{(\d+)}", r"((\1)/(\2))", answer)
    text = re.sub(r"\\sqrt{(\d+)}", r"sqrt(\1)", text).replace(r"\pi", "pi")
    text = re.sub(r"(?<=\d)(?=[a-z])", "*", text)
    return sympy.sympify(text, locals={"i": sympy.I}) == sympy.sympify(expected)


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_answers_are_right_by_a_second_route(family, worked):
    mine = [problem for split in worked[:2] for problem in split if problem.family == family]
    assert len(mine) >= 100
    wrong = [p for p in mine if not same(p.answer, CHECKS[family](p.problem))]
    assert not wrong, f"{len(wrong)} of {len(mine)}, the first: {wrong[0]}"


def test_a_wrong_answer_would_be_noticed():
    assert same(r"-\frac{3}{4}", sympy.Rational(-3, 4)) and not same(r"\frac{3}{4}", sympy.Rational(-3, 4))
    assert same(r"3\sqrt{2}", sympy.sqrt(18)) and not same(r"2\sqrt{3}", sympy.sqrt(18))
    assert same("(2,5)", (2, 5)) and not same("(2,5)", (5, 2))
    assert not same(str(box("A box measures $1$ by $2$ by $3$.") + 1), box("A box measures $1$ by $2$ by $3$."))


def false_equations(text):
    """The equations between plain numbers in worked lines that do not hold."""
    wrong = []
    for line in re.split(r"\. |\.$", text):
        sides = [side for side in line.split(" = ") if re.fullmatch(r"[-+*/^().\d ]+|.*\\cdot.*", side)]
        sides = [
            re.sub(r"^[^-\d(]*", "", side) for side in sides if not re.search(r"[a-z,%\\]", side.replace(r"\cdot", ""))
        ]
        amounts = [Fraction(value(re.sub(r"(\d+)/", r"Fraction(\1)/", side), Fraction=Fraction)) for side in sides]
        wrong += [line] * (len(set(amounts)) > 1)
    return wrong


def test_worked_steps_are_true(worked):
    assert false_equations("7 - 3 = 5.") and not false_equations(r"2 \cdot (-3) = -6. (-4)^2 = 16.")
    for problem in worked[0]:
        assert not false_equations(". ".join(problem.steps) + "."), problem


# --- the teacher


def test_teacher_is_as_noisy_as_it_says(traces):
    verdicts = [r1_zero_reward_fn(row["response"], row["ground_truth"]) for row in traces]
    formed = sum(verdict["format_reward"] == 1 for verdict in verdicts) / len(traces)
    right = sum(verdict["reward"] == 1 for verdict in verdicts) / len(traces)
    assert right == pytest.approx(teacher.SHARES["good"], abs=0.002)
    assert formed == pytest.approx(teacher.SHARES["good"] + teacher.SHARES["slip"], abs=0.002)
    assert math.isclose(sum(teacher.SHARES.values()), 1) and 0.15 <= 1 - right <= 0.25


def test_each_kind_of_response_is_graded_as_meant(worked):
    rng = random.Random(3)
    for kind in teacher.SHARES:
        for problem in rng.sample(worked[2], 60):
            verdict = r1_zero_reward_fn(teacher.write(problem, kind, rng), problem.answer)
            assert verdict["reward"] == (kind == "good"), (kind, problem)
            assert verdict["format_reward"] == (kind in ("good", "slip")), (kind, problem)


def test_noise_does_not_depend_on_the_problem(traces, train):
    """Bad traces are as hard as good ones: their shares by level and by subject differ by chance only."""
    rows = {row["problem"]: row for row in train}
    for key in ("level", "subject"):
        bad = Counter()
        total = Counter(rows[question(row)][key] for row in traces)
        for row in traces:
            bad[rows[question(row)][key]] += r1_zero_reward_fn(row["response"], row["ground_truth"])["reward"] == 0
        assert all(0.12 < bad[name] / total[name] < 0.31 for name in total), bad


def test_every_gold_answer_passes_as_itself_and_no_constant_does(validation):
    form = " So. </think> <answer> {} </answer>"
    passed = [r1_zero_reward_fn(form.format(row["answer"]), row["answer"])["reward"] for row in validation]
    constant = [r1_zero_reward_fn(form.format("6"), row["answer"])["reward"] for row in validation]
    assert all(passed) and sum(constant) < 0.05 * len(validation)


# --- tokenizer and model


def test_tokenizer_is_made_again(tokenizer):
    again = make_tokenizer(make_data.DATA, make_data.SEED)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_tokens_come_back_as_the_text(tokenizer, traces, validation):
    for row in traces[:300]:
        for text in (row["prompt"], row["response"]):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for text in (" </think> <answer> 1", " </think>\n<answer> 1", " </think><answer> 1"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_single_and_the_template_is_short(tokenizer):
    assert all(len(re.sub(r"\D", "", piece)) <= 1 for piece in tokenizer.get_vocab())
    assert len(tokenizer(make_data.PROMPT.read_text())["input_ids"]) < 110
    assert tokenizer.eos_token == tokenizer.pad_token == END
    assert END not in tokenizer.decode(tokenizer("3 + 4")["input_ids"])  # nothing is added


def test_model_loads_and_is_small():
    import torch
    from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert isinstance(model, Qwen2ForCausalLM) and model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings and model.num_parameters() < 8_000_000
    weights = list(MODEL.glob("*.safetensors"))
    assert len(weights) == 1 and weights[0].stat().st_size <= 16e6
