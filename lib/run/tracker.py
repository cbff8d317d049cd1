"""What a run leaves behind: its folder of JSON and JSON-lines files, and the same numbers in wandb."""

import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from lib.files import UserError, append_lines, shorten_path, write_json, write_lines
from lib.run import lock as locks
from lib.run.wandb_copy import WandbCopy
from lib.settings import RunConfig


@dataclass(frozen=True)
class Past:
    """What a stopped run had measured up to the checkpoint from which it goes on."""

    metrics: list[dict]
    evaluations: list[dict]
    elapsed: float  # seconds from its start to the checkpoint
    seconds: dict  # of its parts
    wandb_id: str
    resumed: list[dict]


class Tracker:
    """Writes a run's folder, and wandb's copy of it.

    The files are the truth: `config.json` first, `metrics.jsonl` and `evaluations.jsonl` line by line, `summary.json`
    last, so that its presence means a finished run.
    """

    def __init__(self, config: RunConfig, environment: dict, data_sizes: dict, past: Past | None = None):
        self.config = config
        self.run_dir = config.run_dir
        self.metrics = list(past.metrics) if past else []
        self.evaluations = list(past.evaluations) if past else []
        self.resumed = list(past.resumed) if past else []
        self.started = time.time() - (past.elapsed if past else 0.0)
        if past is None:
            _clear(self.run_dir)
        (self.run_dir / "evaluations").mkdir(parents=True, exist_ok=True)
        wandb_id = past.wandb_id if past else secrets.token_hex(4)
        written = {"parameters": config.to_dict(), "environment": environment, "data": data_sizes}
        write_json(self.run_dir / "config.json", written | {"wandb_id": wandb_id, "resumed": self.resumed})
        if past is not None:
            write_lines(self.run_dir / "metrics.jsonl", self.metrics)
            write_lines(self.run_dir / "evaluations.jsonl", self.evaluations)
            (self.run_dir / "failed.json").unlink(missing_ok=True)
        shown = {**config.to_dict(), "environment": environment, "data": data_sizes}
        self.wandb = WandbCopy(config.wandb_mode, self.run_dir, wandb_id, config.wandb_project, shown)

    def log_train(self, metrics: dict) -> None:
        """Append one optimizer step to `metrics.jsonl` and wandb's train/*."""
        append_lines(self.run_dir / "metrics.jsonl", [metrics])
        self.metrics.append(metrics)
        step = metrics["train_step"]
        self.wandb.log({"train_step": step} | {f"train/{k}": v for k, v in metrics.items() if k != "train_step"})

    def log_evaluation(self, parts: list[tuple[dict, list[dict] | None]]) -> list[dict]:
        """Write the (summary, records) of one evaluation: records to files of their own, summaries to
        `evaluations.jsonl` all at once and to eval/*. Returns the lines written.

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
            numbers = {
                f"eval/{k}{suffix}": v
                for k, v in line.items()
                if isinstance(v, int | float) and k not in ("train_step", "eval_step")
            }
            self.wandb.log({"eval_step": line["eval_step"]} | numbers)
        return lines

    def finish(self, summary: dict) -> dict:
        """Write `summary.json`, which marks the run as finished, and close wandb."""
        seconds = {"total": time.time() - self.started} | summary.pop("seconds", {})
        result = {"status": "finished", "seconds": seconds, "resumed": self.resumed, **summary}
        write_json(self.run_dir / "summary.json", result)
        self.wandb.finish(0)
        return result

    def fail(self, error: BaseException) -> None:
        """Leave `failed.json` with the error; what was measured so far stays. A full disk raises OSError again."""
        said = {"error": str(error), "type": type(error).__name__, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
        try:
            write_json(self.run_dir / "failed.json", said)
        finally:
            self.wandb.finish(1)


def _clear(run_dir: Path) -> None:
    """Remove what an unfinished run, or one to be overwritten, left in its folder; refuse a folder of other things."""
    if not run_dir.exists():
        return
    ours = {"config.json", "metrics.jsonl", "evaluations.jsonl", "evaluations", "summary.json", "failed.json", "wandb"}
    ours |= {"run.log", "model", "checkpoints", locks.NAME}
    foreign = sorted(p.name for p in run_dir.iterdir() if p.name.removesuffix(".tmp") not in ours)
    if foreign:
        raise UserError(
            f"run_name={run_dir.name!r}: {shorten_path(run_dir)} holds files that no run wrote "
            f"({', '.join(foreign[:3])}); choose another run_name"
        )
    for path in run_dir.iterdir():
        if path.name in ("run.log", locks.NAME):
            continue  # already open for this run
        shutil.rmtree(path) if path.is_dir() else path.unlink()
