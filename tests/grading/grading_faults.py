"""Ways in which a worker process can fail: it stands in for `lib.grading.algebra` (test_worker_processes)."""

import os
import signal
import time

from lib.grading import algebra

# Each is equal to a gold answer (x+11, ...), so that it reaches a worker.
HANG, HANG_IN_C, MEMORY, KILLED, EXIT, WAIT = "11+x", "12+x", "13+x", "14+x", "15+x", "16+x"


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
    if answer == WAIT:
        time.sleep(3)
    return algebra.are_equal(gold, answer)
