"""What a run leaves behind: its folder of JSON and JSON-lines files, and the same numbers in wandb."""

import json
import os
import shutil
import time
from pathlib import Path

from lib.config import RunConfig, UserError, shorten_path, write_json


class Tracker:
    """Writes a run's folder, and wandb beside it (train/* over train_step, eval/* over eval_step).

    The files are the truth: `config.json` first, `metrics.jsonl` and `evaluations.jsonl` line by line, `summary.json`
    last, so that its presence means a finished run. A wandb that is missing or unreachable costs its plots only.
    """

    def __init__(self, config: RunConfig, environment: dict, data_sizes: dict):
        self.config = config
        self.run_dir = config.run_dir
        self.started = time.time()
        self.eval_step = 0
        self.wandb = None
        self.wandb_note = ""
        _clear(self.run_dir)
        (self.run_dir / "evaluations").mkdir(parents=True, exist_ok=True)
        write_json(
            self.run_dir / "config.json",
            {"parameters": config.to_dict(), "environment": environment, "data": data_sizes},
        )
        self._start_wandb(environment, data_sizes)

    def log_train(self, metrics: dict) -> None:
        """Append one optimizer step to `metrics.jsonl` and wandb's train/*."""
        _append_json(self.run_dir / "metrics.jsonl", metrics)
        step = metrics["train_step"]
        self._log_wandb({"train_step": step} | {f"train/{k}": v for k, v in metrics.items() if k != "train_step"})

    def log_evaluation(self, summary: dict, records: list[dict] | None) -> dict:
        """Write an evaluation's records to a file of their own and its summary to `evaluations.jsonl` and eval/*.

        Without `records` the summary names a file of another run, which `records` of the line then points to.
        """
        line = summary | {"eval_step": self.eval_step}
        if records is not None:
            line["records"] = f"evaluations/{self.eval_step:03d}-{summary['split']}-{summary['decoding']}.jsonl"
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            temporary = self.run_dir / (line["records"] + ".tmp")
            temporary.write_text(lines, encoding="utf-8")
            temporary.replace(self.run_dir / line["records"])
        _append_json(self.run_dir / "evaluations.jsonl", line)
        kind = (summary["split"], summary["decoding"])
        suffix = "" if kind == ("subset", "sampled") else "_" + "_".join(kind)
        numbers = {
            k: v for k, v in summary.items() if isinstance(v, int | float) and k not in ("train_step", "eval_step")
        }
        self._log_wandb({"eval_step": self.eval_step} | {f"eval/{k}{suffix}": v for k, v in numbers.items()})
        self.eval_step += 1
        return line

    def finish(self, summary: dict) -> dict:
        """Write `summary.json`, which marks the run as finished, and close wandb."""
        seconds = {"total": time.time() - self.started} | summary.pop("seconds", {})
        result = {"status": "finished", "seconds": seconds, **summary}
        write_json(self.run_dir / "summary.json", result)
        self._finish_wandb(0)
        return result

    def fail(self, error: BaseException) -> None:
        """Leave `failed.json` with the error; what was measured so far stays."""
        write_json(
            self.run_dir / "failed.json",
            {"error": str(error), "type": type(error).__name__, "time": time.strftime("%Y-%m-%dT%H:%M:%S")},
        )
        self._finish_wandb(1)

    # wandb: every call is guarded, because a study must not depend on a service.

    def _start_wandb(self, environment: dict, data_sizes: dict) -> None:
        mode = self.config.wandb_mode
        if mode == "disabled":
            self.wandb_note = "wandb: disabled"
            return
        try:
            import wandb

            if mode == "auto":
                # Chosen before `init`: falling back after a failed start would wait for a time-out.
                mode = "online" if os.environ.get("WANDB_API_KEY") or _netrc_has_wandb() else "offline"
            self.wandb = wandb.init(
                project=self.config.wandb_project,
                name=self.config.run_name,
                dir=str(self.run_dir),
                mode=mode,
                config={**self.config.to_dict(), "environment": environment, "data": data_sizes},
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=30),
            )
            self.wandb.define_metric("train_step")
            self.wandb.define_metric("eval_step")
            self.wandb.define_metric("train/*", step_metric="train_step")
            self.wandb.define_metric("eval/*", step_metric="eval_step")
            self.wandb_note = f"wandb: {mode}"
        except Exception as error:
            self.wandb = None
            self.wandb_note = f"wandb: not used ({type(error).__name__}: {str(error).splitlines()[0]})"

    def _log_wandb(self, values: dict) -> None:
        if self.wandb is None:
            return
        try:
            self.wandb.log(values)
        except Exception as error:
            self.wandb = None
            self.wandb_note = f"wandb: stopped ({type(error).__name__})"

    def _finish_wandb(self, exit_code: int) -> None:
        if self.wandb is not None:
            try:
                self.wandb.finish(exit_code=exit_code)
            except Exception as error:
                self.wandb_note = f"wandb: not finished ({type(error).__name__})"
            self.wandb = None


def _netrc_has_wandb() -> bool:
    netrc = Path.home() / ".netrc"
    return netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="ignore")


def _clear(run_dir: Path) -> None:
    """Remove what an unfinished run, or one to be overwritten, left in its folder; refuse a folder of other things."""
    if not run_dir.exists():
        return
    ours = {"config.json", "metrics.jsonl", "evaluations.jsonl", "evaluations", "summary.json", "failed.json", "wandb"}
    ours |= {"run.log", "model"}
    foreign = sorted(p.name for p in run_dir.iterdir() if p.name not in ours)
    if foreign:
        raise UserError(
            f"run_name={run_dir.name!r}: {shorten_path(str(run_dir))} holds files that no run wrote "
            f"({', '.join(foreign[:3])}); choose another run_name"
        )
    for path in run_dir.iterdir():
        if path.name == "run.log":
            continue  # already open for this run
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _append_json(path: Path, value: dict) -> None:
    """Append one line in one write, so that a killed run leaves at most one unfinished line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict]:
    """JSONL rows that a run wrote; none where there is no file.

    A last line without its newline is one that a killed run was writing, and is left out. Rows end at a newline only:
    a model's text may hold other characters that Python takes for the end of a line.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{shorten_path(str(path))}:{number}: not JSON ({error.msg})") from error
    return rows
