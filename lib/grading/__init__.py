"""The course's r1_zero reward, safe for text that a model wrote."""

import hashlib
from importlib import metadata
from pathlib import Path

from lib.grading.rule import Grade, grade_in_detail, grade_many, r1_zero_reward_fn
from lib.grading.workers import stop_workers

__all__ = ["Grade", "grade_in_detail", "grade_many", "r1_zero_reward_fn", "stop_workers", "version"]


def version() -> str:
    """Return a hash over this package's source files and sympy's version: the same hash, the same verdicts."""
    digest = hashlib.sha256(f"sympy {metadata.version('sympy')}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"\n{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
