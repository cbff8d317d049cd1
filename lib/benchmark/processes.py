"""Each part in a process of its own: GPUs side by side, a limit of time each, the CPU's part last."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from lib.benchmark.rows import PEERS, VARIANTS, read_rows
from lib.environment import device_name, versions
from lib.files import PROJECT_ROOT, UserError, append_lines

LANES = (("ours", "memory", "trl"), ("evaluation", "lengths"))  # what goes onto one GPU each, where there are two


def machine() -> str:
    """Devices and versions in a few lines."""
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    lines = [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus] or ["no NVIDIA GPU"]
    packages = ", ".join(f"{name} {version}" for name, version in versions(*PEERS).items())
    return "\n".join([*lines, f"{device_name('cpu')}, {len(os.sched_getaffinity(0))} cores", packages])


def run_parts(parts: list[str], folder: Path, settings: dict, limits: dict[str, int]) -> dict[str, float]:
    """Run parts and return the seconds each took. Two GPUs work at the same time.

    `limits`: seconds that each part may take. Other parts' rows in the folder stay.
    """
    if unknown := set(parts) - set(VARIANTS):
        raise UserError(f"parts: {', '.join(sorted(unknown))} unknown; there are {', '.join(VARIANTS)}")
    folder.mkdir(parents=True, exist_ok=True)
    seconds, gpus = {}, visible_gpus()

    def work(lane: tuple[str, ...], gpu: str) -> None:
        for part in lane:
            if part in parts:
                seconds[part] = run_part(part, folder, settings, limits[part], gpu)

    lanes = zip(LANES, gpus, strict=False) if len(gpus) > 1 else [(LANES[0] + LANES[1], gpus[0])]
    with ThreadPoolExecutor() as pool:
        for working in [pool.submit(work, *lane) for lane in lanes]:
            working.result()
    work(("cpu",), "")
    return seconds


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name one by one; one empty name where there is no GPU."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    return named.split(",")[:count] or [""]


def run_part(part: str, folder: Path, settings: dict, limit: float, gpu: str) -> float:
    """Run one part on one GPU for at most `limit` seconds; variants it did not get to become rows with an error."""
    out, log, started = folder / f"{part}.jsonl", folder / f"{part}.log", time.monotonic()
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "lib.benchmark", part, "--out", str(out.resolve())]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"}
    with open(log, "w", encoding="utf-8") as printed:
        streams = {"stdin": subprocess.DEVNULL, "stdout": printed, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=PROJECT_ROOT, env=environment, start_new_session=True, **streams)
        try:
            reason = f"its process ended with status {process.wait(limit)} (see {log.name})"
        except subprocess.TimeoutExpired:
            reason = f"not measured within {limit:g} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its group: engines and workers too
            process.wait()
    done = {row["variant"] for row in read_rows(folder) if row["part"] == part}
    missing = [variant for variant in VARIANTS[part] if variant not in done]
    append_lines(out, [{"part": part, "variant": variant, "error": reason} for variant in missing])
    return time.monotonic() - started
