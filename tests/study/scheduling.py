"""How well a cluster is used: many runs of known length on pairs of GPUs that are not there.

    python tests/study/scheduling.py 1 4 16 64

A study's own `run_all` and `Cluster` hand 200 runs (sizes and seeds of a real study) to a real Ray, whose node claims
to have so many GPUs; a task sleeps as long as its run would take, in scaled time. Printed: seconds against the ideal,
which is the sum of all lengths over the pairs, or the longest run. Worker processes are started before, as a cluster's
nodes start them side by side.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import ray

from lib.study import cluster, progress, runs
from lib.study.node import pack
from lib.study.plan import plan

SIZES = ("128", "256", "512", "1024", "1353", "2048", "all", "filtered")
SEEDS, IDEAL = 25, 60.0  # seconds


def simulate(pairs: int, ideal: float = IDEAL, seeds: int = SEEDS) -> tuple[float, float, int]:
    """Seconds of the study, the least that it could take, and the most runs at work at a time."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "runs"
        (folder / "base-0").mkdir(parents=True)
        (folder / "base-0/settings.json").write_text("{}")
        planned = plan(folder, SIZES, range(seeds))
        work = {run.name: progress.work(run) for run in planned}
        scale = ideal * pairs / sum(work.values())
        calm = {"include_dashboard": False, "log_to_driver": False, "_system_config": {"worker_niceness": 0}}
        ray.init("local", num_gpus=2 * pairs, num_cpus=pairs, **calm)
        warm_up(pairs, Path(place))

        @ray.remote
        def sleep_run(_work, run, _bases):
            began = time.time()
            time.sleep(work[run.name] * scale)
            made = Path(tempfile.mkdtemp())
            (made / run.name).mkdir()
            result = {"status": "finished", "began": began, "ended": time.time()}
            (made / run.name / "summary.json").write_text(json.dumps(result))
            yield pack(made, [made / run.name])
            yield None

        cluster.execute_run, cluster.connect, cluster.refuse_nodes = sleep_run, lambda *_: None, lambda *_: None
        machine = cluster.Cluster("local", folder, {}, gpus=2, cpus=1)
        began = time.time()
        with contextlib.redirect_stdout(io.StringIO()):
            outcome = runs.run_all(planned, folder, machine)
        seconds = time.time() - began
        assert len(outcome.finished) == len(planned), outcome.failed
        results = [json.loads(path.read_text()) for path in folder.glob("*/summary.json")]
        at_once = max(sum(r["began"] <= one["began"] < r["ended"] for r in results) for one in results)
        machine.close()
    return seconds, max(ideal, max(work.values()) * scale), at_once


def warm_up(pairs: int, place: Path) -> None:
    """Have Ray start a worker process for each pair: none goes on before all are there."""

    @ray.remote  # with GPUs here, a worker would end with its first task; with them as options it stays, as a study's
    def wait(number):
        import lib.study.node  # noqa: F401  what a task imports

        (place / f"worker-{number}").touch()
        while len(list(place.glob("worker-*"))) < pairs:
            time.sleep(0.5)

    ray.get([wait.options(num_gpus=2, num_cpus=1).remote(number) for number in range(pairs)])


if __name__ == "__main__":
    print("| pairs of GPUs | runs | ideal, s | makespan, s | over the ideal | at once |\n|---|---|---|---|---|---|")
    for pairs in map(int, sys.argv[1:]):
        seconds, ideal, at_once = simulate(pairs)
        ratio = seconds / ideal
        print(f"| {pairs} | {len(SIZES) * SEEDS} | {ideal:.1f} | {seconds:.1f} | {ratio:.2f} | {at_once} |", flush=True)
