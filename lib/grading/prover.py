"""A worker process: `workers.py` runs this file in an interpreter of its own, which answers questions until its end.

A question is a list of pairs (gold, answer) that must all be equal. The answer is true, false, or null where the
memory or the depth that algebra needs is not there. What needs more processor time than allowed ends the process:
the timer's signal is handled by the kernel, so it stops a computation in C as well.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection

LONGEST_START = 60.0  # seconds of processor time
PATROL = 5.0  # seconds between two looks whether the parent lives: a fork of it may keep the pipe open


def main(path: list[str], module: str, memory_bytes: int) -> None:
    """Answer the questions that come through the pipe (descriptor 0), until it closes or the parent process is gone."""
    parent = os.getppid()
    sys.path[:] = path
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, LONGEST_START)
    limit_memory(memory_bytes)
    are_equal = importlib.import_module(module).are_equal
    are_equal("x+1", "1+x")  # imports sympy before a question's clock runs
    signal.setitimer(signal.ITIMER_PROF, 0)

    connection = Connection(0)
    connection.send_bytes(b'"ready"')
    while True:
        while not connection.poll(PATROL):
            if os.getppid() != parent:
                return
        pairs, seconds = json.loads(connection.recv_bytes())
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer = all(are_equal(*pair) for pair in pairs)
        except Exception:  # no memory, too deep, or an expression that sympy fails at: not decided
            answer = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(json.dumps(answer).encode())


def limit_memory(memory_bytes: int) -> None:
    """Bound the address space to what it is now and `memory_bytes` more; a limit that is there already stays."""
    import psutil

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = psutil.Process().memory_info().vms + memory_bytes
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent closed the pipe or is gone
        main(**json.loads(sys.argv[1]))
