"""Worker processes: grading gives the same verdicts whatever process asks, within limits, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grading_faults
import pytest

from lib import grading
from lib.grading import Grade, grade_in_detail, grade_many, r1_zero_reward_fn, workers

ROOT = Path(__file__).parents[2]


def respond(answer: str) -> str:
    """Return a response of the right form with this answer."""
    return f" I think. </think> <answer>{answer}</answer>"


def is_right(gold, answer: str) -> bool:
    return r1_zero_reward_fn(respond(answer), gold)["reward"] == 1


@pytest.fixture
def misbehaving(monkeypatch):
    grading.stop_workers()
    monkeypatch.setattr(workers, "PROVER", "grading_faults")
    yield
    grading.stop_workers()


FAULTS = [getattr(grading_faults, name) for name in ("HANG", "HANG_IN_C", "MEMORY", "KILLED", "EXIT")]


def test_an_answer_that_hangs_eats_memory_or_kills_its_worker_is_wrong_and_alone(misbehaving):
    pairs = [("x+1", "1+x")]
    for fault in FAULTS:
        pairs += [("x+" + fault[:2], fault), ("x+1", "x+2"), ("x+1", "1+x")]
    golds, answers = zip(*pairs, strict=True)
    start = time.monotonic()
    grades = grade_in_detail([respond(answer) for answer in answers], golds, workers=2, timeout=1.0)
    right, wrong = Grade(True, True, False, True), Grade(True, False, False, False)
    expected = {"1+x": right, "x+2": wrong} | dict.fromkeys(FAULTS, Grade(True, False, True, False))
    assert grades == [expected[answer] for answer in answers]
    assert time.monotonic() - start < 60


def test_the_limit_is_processor_time(misbehaving):
    """A busy machine: an answer that waits for longer than its limit is graded all the same."""
    assert grade_in_detail([respond(grading_faults.WAIT)], ["x+16"], workers=1, timeout=0.5) == [
        Grade(form=True, correct=True, undecided=False, lenient=True)
    ]


def test_a_stopped_worker_that_goes_on_in_time_is_waited_for():
    assert is_right("x+1", "1+x")
    process = workers._pool[0].process
    process.send_signal(signal.SIGSTOP)
    timer = threading.Timer(3.0, process.send_signal, [signal.SIGCONT])
    timer.start()
    assert grade_in_detail([respond("x+3")], ["3+x"], timeout=1.0)[0].correct
    timer.join()


def test_a_worker_that_stays_stopped_is_replaced(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 1.0)
    grading.stop_workers()
    assert is_right("x+1", "1+x")
    stopped = workers._pool[0].process
    stopped.send_signal(signal.SIGSTOP)
    assert is_right("x+4", "4+x")
    assert stopped.returncode == -signal.SIGKILL


@pytest.mark.parametrize("module", ["no_such_module", "test_worker_processes_without_are_equal", "json"])
def test_workers_that_cannot_start_say_why(monkeypatch, module):
    grading.stop_workers()
    monkeypatch.setattr(workers, "PROVER", module)
    with pytest.raises(RuntimeError, match=f"can't start: .*'{module}'"):
        is_right("x+1", "1+x")


def test_an_interpreter_that_is_not_there_is_the_reason(monkeypatch):
    grading.stop_workers()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(RuntimeError, match=r"can't start: .*No such file.*/no/such/python"):
        is_right("x+1", "1+x")


def test_the_pool_has_the_size_that_the_process_may_use():
    """A process that is bound to one core starts one worker, however many cores the machine has."""
    program = (
        "import os\n"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from lib.grading import grade_many, workers\n"
        "grade_many([f'</think> <answer>{n}+x</answer>' for n in range(2, 9)], [f'x+{n}' for n in range(2, 9)])\n"
        "print(len(workers._pool))\n"
    )
    assert run([sys.executable, "-c", program]) == "1"


def test_workers_killed_from_outside_cost_nothing():
    """The out-of-memory killer, say: idle workers are replaced, the next answers are graded as ever."""
    assert is_right("x+1", "1+x")
    for worker in workers._pool:
        worker.process.kill()
    assert is_right("x+1", "1+x+0")
    assert not is_right("x+1", "1+x+1")


def test_a_worker_killed_before_it_is_told_its_work_costs_nothing(monkeypatch):
    """Seen once in many runs whose workers were hunted: its pipe was broken before the first word."""
    started = []

    def start(*arguments, **options):
        process = subprocess.Popen(*arguments, **options)
        started.append(process)
        if len(started) == 1:
            process.kill()
            process.wait()
        return process

    workers.stop_workers()
    monkeypatch.setattr(workers, "Popen", start)
    assert is_right("x+1", "1+x+0") and len(started) == 2


def test_the_smallest_memory_is_enough_for_ordinary_answers():
    response = respond("1+x")
    assert grade_many([response], ["x+1"], workers=1, memory_bytes=workers.SMALLEST_MEMORY)[0]["reward"] == 1


def test_workers_stay_for_the_next_call_and_leave_with_the_process():
    program = (
        "import os, signal\n"
        "from lib.grading import grade_many, workers\n"
        "for answer in ('1+x', 'x+2'):\n"
        "    grade_many([f'</think> <answer>{answer}</answer>'], ['x+1'], workers=1)\n"
        "    print(*[worker.process.pid for worker in workers._pool], flush=True)\n"
    )
    for end in ("", "os.kill(os.getpid(), signal.SIGKILL)"):
        finished = subprocess.run([sys.executable, "-c", program + end], capture_output=True, text=True, timeout=60)
        first, second = finished.stdout.split()
        assert first == second
        deadline = time.monotonic() + 20
        while is_running(int(first)):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.1)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Whoever asks

GRADE = "from lib.grading import r1_zero_reward_fn as grade\n"
SCORE = "def score(a): return grade(f'</think> <answer>{a}</answer>', 'x+1')['reward']\n"
CALL = GRADE + SCORE + "print(score('1+x'), score('x+2'))\n"
MAPPED = "print(*pool.map(score, ['7', '1+x', 'x+2', '1+1+x-1']))\n"
EXPECTED = "1.0 0.0"
PROGRAMS = {
    "no main guard": CALL,
    "main guard": GRADE + SCORE + "if __name__ == '__main__':\n    print(score('1+x'), score('x+2'))\n",
    "much address space": "import mmap\nmapped = mmap.mmap(-1, 8 << 30)\n" + CALL,
    "thread": GRADE + SCORE + "import threading\n"
    "t = threading.Thread(target=lambda: print(score('1+x'), score('x+2')))\nt.start()\nt.join()\n",
    "daemon thread while another grades": GRADE + SCORE + "import threading\n"
    "threading.Thread(target=lambda: [score(f'{n}+x') for n in range(10**6)], daemon=True).start()\n"
    "print(score('1+x'), score('x+2'))\n",
    "fork after use": CALL.replace("print(", "first = (") + "import os, sys\n"
    "if os.fork() == 0:\n    print(score('x+1+0'), score('x+3'), flush=True)\n    os._exit(0)\n"
    "os.wait()\nassert score('x+1-0') == 1\n",
    "fork while a thread grades": GRADE + SCORE + "import os, threading\nscore('1+x')\n"
    "thread = threading.Thread(target=lambda: [score(f'{n}+x-{n - 1}') for n in range(2, 60)])\nthread.start()\n"
    "if os.fork() == 0:\n    print(score('1+x'), score('x+2'), flush=True)\n    os._exit(0)\n"
    "os.wait()\nthread.join()\n",
    "daemonic process": GRADE + SCORE + "import multiprocessing\n"
    "def work(): print(score('1+x'), score('x+2'), flush=True)\n"
    "p = multiprocessing.get_context('fork').Process(target=work, daemon=True)\np.start()\np.join()\n",
    "exits at once": CALL
    + "import os\nos._exit(0)\n".replace("os._exit", "__import__('sys').stdout.flush(); os._exit"),
    "closed descriptors": "import os\nos.close(0)\nos.close(2)\n" + CALL,
    "signals ignored and blocked": "import signal\n"
    "for s in (signal.SIGPROF, signal.SIGINT, signal.SIGCHLD): signal.signal(s, signal.SIG_IGN)\n"
    "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF, signal.SIGTERM])\n" + CALL,
    "odd search path": "import sys\nsys.path.append(sys.path.pop(0))\nsys.path.insert(0, '')\n" + CALL,
    "asyncio": GRADE + SCORE + "import asyncio\n"
    "async def main(): return await asyncio.gather(asyncio.to_thread(score, '1+x'), asyncio.to_thread(score, 'x+2'))\n"
    "print(*asyncio.run(main()))\n",
}


def run(command: list, **options) -> str:
    """Run a program that must end in time without a complaint; return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, **options)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.mark.parametrize("kind", PROGRAMS)
def test_grading_does_not_depend_on_the_program(kind, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROGRAMS[kind])
    assert run([sys.executable, script], cwd=tmp_path) == EXPECTED


@pytest.mark.parametrize("option", ["-", "-i", "-c"])
def test_grading_works_without_a_file(option, tmp_path):
    """From standard input, in an interactive interpreter, and on the command line."""
    program = [CALL] if option == "-c" else []
    typed = CALL.replace("\nprint", "\n\nprint")
    assert run([sys.executable, option, *program], input=None if program else typed, cwd=tmp_path) == EXPECTED


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("first", ["", "score('x+1-0')"])
@pytest.mark.parametrize("pool", ["ProcessPoolExecutor", "Pool"])
def test_a_pool_of_processes_grades_and_ends(pool, first, method, tmp_path):
    """Also after its parent has graded; the workers of `multiprocessing.Pool` are daemonic."""
    make = {
        "ProcessPoolExecutor": f"ProcessPoolExecutor(2, mp_context=get_context('{method}'))",
        "Pool": f"get_context('{method}').Pool(2)",
    }[pool]
    script = tmp_path / "script.py"
    script.write_text(
        GRADE + SCORE + "from concurrent.futures import ProcessPoolExecutor\nfrom multiprocessing import get_context\n"
        f"if __name__ == '__main__':\n    {first or 'pass'}\n    pool = {make}\n    {MAPPED}"
    )
    assert run([sys.executable, script]) == "0.0 1.0 0.0 1.0"


def test_a_notebook_grades_in_cells_and_threads():
    nbformat = pytest.importorskip("nbformat")
    from nbclient import NotebookClient

    cells = [CALL, "import threading\nt = threading.Thread(target=print, args=[score('x+1+0')])\nt.start()\nt.join()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    assert [cell.outputs[0].text.strip() for cell in notebook.cells] == [EXPECTED, "1.0"]


def test_a_worker_leaves_although_a_fork_of_its_parent_keeps_the_pipe_open():
    program = (
        "import os, signal, subprocess, sys\n" + GRADE + SCORE + "from lib.grading import workers\nscore('1+x')\n"
        "pipe = os.dup(workers._pool[0].pipe.fileno())\n"
        "if os.fork() == 0:\n    os.close(1)\n    os.close(2)\n    import time\n    time.sleep(30)\n    os._exit(0)\n"
        "print(workers._pool[0].process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    deadline = time.monotonic() + 20
    while is_running(int(finished.stdout)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def test_importing_the_grader_is_cheap():
    """Worker processes and notebooks import it: neither torch nor sympy may come along."""
    program = (
        "import sys, lib.grading; print(*{'torch', 'sympy', 'latex2sympy2_extended', 'psutil'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == ""
