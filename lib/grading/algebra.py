"""Equality of small algebraic expressions, without evaluating any text as code.

An expression is a canonical spelling from `answers.py` (digits, letters, + - * / ^ ( ), pi, and √⟨...⟩), read with
`ast.parse` and built node by node. sympify, parse_expr and latex2sympy hand some of the text to Python's `eval`.
"""

import ast
import functools
import operator
import re

LONGEST_EXPRESSION = 150  # characters
MOST_LETTERS = 2  # as the course has it
ALLOWED = re.compile(r"(?:[0-9a-zπ+\-*/^().]|√⟨|√\[[2-9]\]⟨|⟩)+")
REFUSED = re.compile(
    r"\^(?!-?[0-9a-z](?![0-9.^]))"  # powers other than x^2, x^-2, 2^x; towers
    r"|[*/]{2}"
    r"|[0-9]{16}"  # long numbers
    r"|[a-z)⟩][0-9]"  # x2 is an index or a mistake
    r"|[/.][0-9]+\.(?![0-9])"  # a stop behind a fraction or decimal, as the course has it ("5." is fine)
)
TO_PYTHON = [
    (r"pi", "π"),
    (r"(?<=[0-9])\.(?![0-9])", ""),
    (r"([0-9]+)\.([0-9]+)", lambda found: f"({found[1]}{found[2]}/1{'0' * len(found[2])})"),  # exact, not a float
    (r"(?<=[0-9a-zπ)⟩])(?=[a-zπ(√])", "*"),
    (r"(?<![0-9])0+(?=[0-9])", ""),
    (r"√⟨", "root2("),
    (r"√\[([2-9])\]⟨", r"root\1("),
    (r"⟩", ")"),
    (r"\^", "**"),
    (r"π", "pi"),
]
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def is_algebra(gold: str, answer: str) -> bool:
    """Tell whether two canonical spellings are expressions that are small and plain enough to be compared."""
    both = f"{gold} {answer}"
    if len(set(re.findall(r"[a-z]", both))) > MOST_LETTERS or REFUSED.search(both):
        return False
    texts = (gold.replace("pi", "π"), answer.replace("pi", "π"))
    return all(len(text) <= LONGEST_EXPRESSION and ALLOWED.fullmatch(text) for text in texts)


@functools.lru_cache(maxsize=10_000)
def parse(text: str) -> ast.expr:
    """Return the syntax tree of an expression that passed `is_algebra`, or raise SyntaxError ("2+*3")."""
    for pattern, replacement in TO_PYTHON:
        text = re.sub(pattern, replacement, text)
    return ast.parse(text, mode="eval").body


def build(node: ast.expr, number, letter, root):
    """Build the value of a syntax tree; the functions say what an integer, a letter (or pi) and a root stand for."""
    match node:
        case ast.Constant(value=int() as value):
            return number(value)
        case ast.Name(id=name):
            return letter(name)
        case ast.UnaryOp(op, operand):
            return OPERATIONS[type(op)](build(operand, number, letter, root))
        case ast.BinOp(left, op, right):
            return OPERATIONS[type(op)](build(left, number, letter, root), build(right, number, letter, root))
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name.startswith("root"):
            return root(build(argument, number, letter, root), int(name.removeprefix("root")))
    raise ValueError(f"not part of an expression: {type(node).__name__}")


def may_be_equal(gold: str, answer: str) -> bool:
    """Compare the values of two expressions at one point to 50 digits: False refutes cheaply, True proves nothing."""
    from mpmath import mp

    def letter(name):
        return mp.pi if name == "pi" else mp.mpf(ord(name)) / 89 - 1 / mp.sqrt(7)  # any point will do

    with mp.workdps(50):
        try:
            gold_value, answer_value = (build(parse(text), mp.mpf, letter, mp.root) for text in (gold, answer))
            return abs(gold_value - answer_value) <= mp.mpf(10) ** -30 * (1 + abs(gold_value))
        except (ArithmeticError, ValueError, SyntaxError, MemoryError, RecursionError):  # no value, no meaning
            return False


def are_equal(gold: str, answer: str) -> bool:
    """Tell whether two expressions are equal. It may take long or much memory: call it in a worker process."""
    import sympy

    def letter(name):
        return sympy.pi if name == "pi" else sympy.Symbol(name)

    gold_value, answer_value = (build(parse(text), sympy.Integer, letter, sympy.root) for text in (gold, answer))
    return sympy.simplify(gold_value - answer_value) == 0
