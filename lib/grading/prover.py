"""A worker process: `workers.py` runs this file in an interpreter of its own, which answers questions until its end.

A question is a tuple of pairs (gold, answer) that must all be equal. The answer is True, False, or None where the
memory or the depth that algebra needs is not there. What needs more processor time than allowed ends the process: the
timer's signal is handled by the kernel, so it stops a computation in C as well.
"""

import importlib
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection

PATROL = 5.0  # seconds between two looks whether the parent lives: a fork of it may keep the pipe open


def main() -> None:
    """Answer the questions that come through the pipe (descriptor 0), until it closes or the parent process is gone."""
    parent, connection = os.getppid(), Connection(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sys.path[:], module = connection.recv()
    try:
        are_equal = importlib.import_module(module).are_equal
        are_equal("x+1", "1+x")  # imports sympy before a question's clock runs
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        return

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    while True:
        while not connection.poll(PATROL):
            if os.getppid() != parent:
                return
        pairs, seconds, memory_bytes = connection.recv()
        soft = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer = all(are_equal(*pair) for pair in pairs)
        except Exception:  # no memory, too deep, or an expression that sympy fails at: not decided
            answer = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        connection.send(answer)


if __name__ == "__main__":
    main()
