"""Each part in a process of its own, with a limit of time; what a GPU does meanwhile."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

from lib.benchmark.rows import VARIANTS
from lib.data import load_examples, load_problems
from lib.files import PROJECT_ROOT, UserError, append_lines, read_lines
from lib.model_files import check_model


def check_inputs(settings: dict) -> None:
    """UserError for models or data that no part could read: their rows would take the place of good ones."""
    for parameter in ("model", "trained"):
        if settings[parameter]:
            check_model(settings[parameter], None, trust_remote_code=False, parameter=parameter)
    load_examples(Path(settings["data_dir"]))
    load_problems(Path(settings["data_dir"], "validation.jsonl"))


def run_parts(
    parts: list[str], folder: Path, settings: dict, limits: dict[str, int], variants: dict[str, list[str]]
) -> dict[str, float]:
    """Run parts, each for at most its `limits` in seconds; the seconds each took. `variants`: of a part, if not all."""
    if unknown := set(parts) - set(VARIANTS):
        raise UserError(f"parts: {', '.join(sorted(unknown))} unknown; there are {', '.join(VARIANTS)}")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = VARIANTS | variants
    return {part: run_part(part, folder, settings | {"variants": chosen[part]}, limits[part]) for part in parts}


def run_part(part: str, folder: Path, settings: dict, limit: float) -> float:
    """Run one part for at most `limit` seconds; variants it did not get to become rows with an error."""
    out, log, started = folder / f"{part}.jsonl", folder / f"{part}.log", time.monotonic()
    before = len(read_lines(out))
    told = json.dumps(settings | {"part": part, "out": str(out.resolve())})
    command = [sys.executable, "-u", "-m", "lib.benchmark", told]
    with open(log, "w", encoding="utf-8") as printed:
        streams = {"stdin": subprocess.DEVNULL, "stdout": printed, "stderr": subprocess.STDOUT}
        try:  # engines and graders end with the process that started them
            status = subprocess.run(command, cwd=PROJECT_ROOT, timeout=limit, **streams).returncode
            reason = f"its process ended with status {status} (see {log.name})"
        except subprocess.TimeoutExpired:
            reason = f"not measured within {limit:g} s"
    done = {row["variant"] for row in read_lines(out)[before:]}
    missing = [variant for variant in settings["variants"] if variant not in done]
    append_lines(out, [{"part": part, "variant": variant, "error": reason} for variant in missing])
    return time.monotonic() - started


@contextlib.contextmanager
def watched(value: str, device: str, gpu: str):
    """What nvidia-smi said of a GPU every 200 ms of a block: `utilization.gpu` in %, `memory.used` in MiB."""
    query = ["nvidia-smi", f"--query-gpu={value}", f"--id={gpu}", "--format=csv,noheader,nounits", "--loop-ms=200"]
    samples: list[int] = []
    sampler = None if device == "cpu" else subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
    try:
        yield samples
    finally:
        if sampler is not None:
            sampler.terminate()
            samples += map(int, sampler.communicate()[0].split())
