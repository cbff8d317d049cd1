"""What a run leaves behind: its folder of JSON and JSON-lines files, and the same numbers in wandb."""

import secrets
import shutil
import time
from pathlib import Path

from lib.files import UserError, append_lines, is_finished, read_json, shorten_path, write_json, write_lines
from lib.run import lock as locks
from lib.run.wandb_copy import WandbCopy
from lib.settings import RunConfig

FILES = {"config.json", "metrics.jsonl", "evaluations.jsonl", "evaluations", "summary.json", "failed.json", "wandb"}
FILES |= {"model", "checkpoints"}
BEFORE = ".before"  # what stood in the folder, until the run that replaces it begins
OPEN = ("run.log", locks.NAME, BEFORE)  # by this process, and that


class Tracker:
    """Writes a run's folder, and wandb's copy of it.

    The files are the truth: `config.json` first, `metrics.jsonl` and `evaluations.jsonl` line by line, `summary.json`
    last, so that its presence means a finished run. `past`: what a stopped run had measured (`resume.read_past`).
    """

    def __init__(self, config: RunConfig, environment: dict, data_sizes: dict, past: dict | None = None):
        self.run_dir = config.run_dir
        if past is None:
            _set_aside(self.run_dir)
            past = {"metrics": [], "evaluations": [], "resumed": [], "elapsed": 0.0, "wandb_id": secrets.token_hex(4)}
        self.metrics, self.evaluations, self.resumed = past["metrics"], past["evaluations"], past["resumed"]
        self.started = time.time() - past["elapsed"]
        (self.run_dir / "evaluations").mkdir(parents=True, exist_ok=True)
        (self.run_dir / "failed.json").unlink(missing_ok=True)
        found, wandb_id = {"environment": environment, "data": data_sizes}, past["wandb_id"]
        written = {"parameters": config.to_dict(), **found, "wandb_id": wandb_id, "resumed": self.resumed}
        write_json(self.run_dir / "config.json", written)
        if self.resumed:  # without what came after its checkpoint
            write_lines(self.run_dir / "metrics.jsonl", self.metrics)
            write_lines(self.run_dir / "evaluations.jsonl", self.evaluations)
        shown = config.to_dict() | found
        self.wandb = WandbCopy(config.wandb_mode, self.run_dir, wandb_id, config.wandb_project, shown)

    def log_train(self, metrics: dict) -> None:
        """Append one optimizer step to `metrics.jsonl` and wandb's train/*."""
        append_lines(self.run_dir / "metrics.jsonl", [metrics])
        self.metrics.append(metrics)
        self.wandb.log({name if name == "train_step" else f"train/{name}": value for name, value in metrics.items()})

    def log_evaluation(self, parts: list[tuple[dict, list[dict] | None]]) -> list[dict]:
        """Write an evaluation's (summary, records): the lines of `evaluations.jsonl` all at once, which it returns.

        Without records a summary comes from another run, and its `records` already names the file there.
        """
        lines = []
        for eval_step, (summary, records) in enumerate(parts, start=len(self.evaluations)):
            line = summary | {"eval_step": eval_step}
            if records is not None:
                line["records"] = f"evaluations/{eval_step:03d}-{summary['split']}-{summary['decoding']}.jsonl.gz"
                write_lines(self.run_dir / line["records"], records)
            lines.append(line)
        append_lines(self.run_dir / "evaluations.jsonl", lines)
        self.evaluations += lines
        for line in lines:
            kind = (line["split"], line["decoding"])
            suffix = "" if kind == ("subset", "sampled") else "_" + "_".join(kind)
            numbers = {f"eval/{k}{suffix}": v for k, v in line.items() if isinstance(v, int | float)}
            self.wandb.log({"eval_step": line["eval_step"]} | numbers)
        return lines

    def finish(self, summary: dict) -> dict:
        """Write `summary.json`, which marks the run as finished, and close wandb."""
        seconds = {"total": time.time() - self.started} | summary["seconds"]
        result = {"status": "finished", "resumed": self.resumed, **summary, "seconds": seconds}
        write_json(self.run_dir / "summary.json", result)
        self.wandb.finish(0)
        return result

    def begin(self) -> None:
        """What was in the folder before is replaced: from now on the run can be made."""
        shutil.rmtree(self.run_dir / BEFORE, ignore_errors=True)

    def fail(self, error: BaseException) -> None:
        """Leave `failed.json` with the error; what was measured so far stays, or what was there before a run that never
        began: a finished one as it was. A full disk raises OSError again."""
        if (self.run_dir / BEFORE).is_dir():
            self.wandb.finish(1)  # its files are among those that go
            put_back(self.run_dir)
            if is_finished(self.run_dir):
                return
        said = {"error": str(error), "type": type(error).__name__, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
        try:
            write_json(self.run_dir / "failed.json", said)
        finally:
            self.wandb.finish(1)


def _set_aside(run_dir: Path) -> None:
    """Move what an unfinished run, or one to be overwritten, left in its folder; refuse a folder of other things."""
    paths = _left(run_dir)
    foreign = sorted(path.name for path in paths if path.name.removesuffix(".tmp") not in FILES)
    if (
        not foreign
        and not (run_dir / "failed.json").is_file()
        and "parameters" not in read_json(run_dir / "config.json")
    ):
        foreign = sorted(path.name for path in paths if path.suffix != ".tmp" and not _is_empty(path))
    if foreign:
        raise UserError(
            f"run_name={run_dir.name!r}: {shorten_path(run_dir)} holds files that no run wrote "
            f"({', '.join(foreign[:3])}); choose another run_name"
        )
    if paths:
        (run_dir / BEFORE).mkdir()
    for path in paths:
        path.rename(run_dir / BEFORE / path.name)


def put_back(run_dir: Path) -> None:
    """Put back what a try that was killed before it began had moved aside, if there was one."""
    if not (run_dir / BEFORE).is_dir():
        return
    for path in _left(run_dir):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (run_dir / BEFORE).iterdir():
        path.rename(run_dir / path.name)
    (run_dir / BEFORE).rmdir()


def _left(run_dir: Path) -> list[Path]:
    return [path for path in run_dir.glob("*") if path.name not in OPEN]


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
