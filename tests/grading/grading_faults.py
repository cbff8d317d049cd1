"""Ways in which a worker process can fail: this module stands in for `lib.grading.algebra` there (test_grading)."""

import os
import signal

from lib.grading import algebra

HANG, HANG_IN_C, MEMORY, KILLED, EXIT = "x+11", "x+12", "x+13", "x+14", "x+15"


def are_equal(gold: str, answer: str) -> bool:
    """Fail as the answer tells, or answer the question."""
    while answer == HANG:
        pass
    if answer == HANG_IN_C:
        return 9**9**9 == 0  # one big-integer operation: no Python-level time-out can stop it
    if answer == MEMORY:
        return bool(bytearray(8 << 30))
    if answer == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if answer == EXIT:
        os._exit(3)
    return algebra.are_equal(gold, answer)
