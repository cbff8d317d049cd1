"""The course's r1_zero reward, safe for text that a model wrote."""

from lib.grading.rule import grade_many, r1_zero_reward_fn
from lib.grading.workers import stop_workers

__all__ = ["grade_many", "r1_zero_reward_fn", "stop_workers"]
