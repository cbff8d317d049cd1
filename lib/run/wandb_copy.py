"""wandb's copy of a run: train/* over train_step, eval/* over eval_step.

Every call is guarded, because a study must not depend on a service: a wandb that is missing or unreachable costs its
plots only.
"""

import http.client
import os
import queue
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from lib.files import first_line

PATIENCE_AT_START = 4  # seconds for the server's first answer
PATIENCE_AT_END = 60  # seconds for what is still to be sent
# What WANDB_MODE and wandb's own settings file may say, in our words.
MODES = {"run": "online", "shared": "online", "dryrun": "offline"}
MODES |= {mode: mode for mode in ("online", "offline", "disabled")}
FALSE = ("", "0", "false", "f", "no", "n", "off")


class WandbCopy:
    """A wandb run, or nothing where there is none; `note` says which, in words for the reader."""

    def __init__(self, asked: str, folder: Path, run_id: str, project: str, config: dict):
        """`asked`: the parameter wandb_mode. `config`: what wandb shows as the run's configuration."""
        self.run = None
        try:
            mode, why = choose_mode(asked)
            self.note = f"wandb: {mode}" + (f" ({why})" if why else "")
            if mode != "disabled":
                self._init(mode, folder, run_id, project, config)
        except Exception as error:
            self.run = None
            self.note = f"wandb: not used ({first_line(error)})"

    def _init(self, mode: str, folder: Path, run_id: str, project: str, config: dict) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=30)
        common = {"project": project, "name": folder.name, "id": run_id, "resume": "allow", "dir": str(folder)}
        try:
            self.run = wandb.init(**common, mode=mode, config=config, settings=settings)
        except Exception as error:
            if mode == "offline":
                raise
            self.note = f"wandb: offline ({first_line(error)})"
            self.run = wandb.init(**common, mode="offline", config=config, settings=settings)
        for axis, metrics in (("train_step", "train/*"), ("eval_step", "eval/*")):
            self.run.define_metric(axis)
            self.run.define_metric(metrics, step_metric=axis)

    def log(self, values: dict) -> None:
        if self.run is None:
            return
        try:
            self.run.log(values)
        except Exception as error:
            self.run = None
            self.note = f"wandb: stopped ({first_line(error)})"

    def finish(self, exit_code: int) -> None:
        """Close the run, but wait only so long: unreachable, wandb would go on trying for days."""
        if self.run is None:
            return
        run, self.run = self.run, None

        def close() -> str:
            try:
                run.finish(exit_code=exit_code)
            except Exception as error:
                return f"wandb: not finished ({first_line(error)})"
            return self.note

        late = f"wandb: not finished after {PATIENCE_AT_END} s; `wandb sync` can send the rest"
        self.note = _within(PATIENCE_AT_END, close, late)


def choose_mode(asked: str) -> tuple[str, str]:
    """Online, offline or disabled, and why, if not by the parameter `asked`; decided before wandb starts anything.

    Falling back after a failed start would wait for wandb's time-outs. "auto" obeys WANDB_DISABLED, WANDB_MODE and
    wandb's settings file, and is online otherwise; a mode given by the parameter wins over them. Online needs
    credentials and a server that answers: without them the run is kept offline, so that `wandb sync` can send it.
    """
    said, mode, why = os.environ.pop("WANDB_MODE", "").strip(), asked, ""
    if said:  # wandb reads it too, and raises on spellings that it does not know
        os.environ["WANDB_MODE"] = MODES.get(said.lower(), "offline")
    if asked == "auto" and os.environ.get("WANDB_DISABLED", "").strip().lower() not in FALSE:
        mode, why = "disabled", "by WANDB_DISABLED"
    elif asked == "auto" and said:
        mode, why = os.environ["WANDB_MODE"], f"by WANDB_MODE={said}"
    if mode in ("offline", "disabled"):
        return mode, why
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    settings = wandb_setup.singleton().settings
    of_files = MODES.get(settings.mode, "online")
    if mode == "auto" and of_files != "online":
        return of_files, "by wandb's settings file"
    try:
        logged_in = wbauth.authenticate_session(host=settings.base_url, source="", prompt=False, update_session=False)
    except Exception as error:  # a key that can't be one
        return "offline", first_line(error)
    if not logged_in:
        return "offline", "not logged in"
    if problem := unreachable(settings.base_url):
        return "offline", f"{settings.base_url}: {problem}"
    return "online", why


def unreachable(server: str) -> str:
    """Why a server can't be reached, by the proxy of the environment if there is one; empty where it answers."""
    # Whether it is the right server is wandb's to check: nothing is sent here.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def ask() -> str:
        try:
            request = urllib.request.Request(server, method="HEAD")
            urllib.request.urlopen(request, timeout=PATIENCE_AT_START, context=context).close()
        except urllib.error.HTTPError as answer:  # of the server, or of a proxy that can't reach it
            return f"HTTP status {answer.code}" if answer.code >= 500 or answer.code == 407 else ""
        except (OSError, ValueError, http.client.HTTPException) as error:
            return first_line(getattr(error, "reason", error))
        return ""

    # Looking up a name has no time limit of its own.
    return _within(PATIENCE_AT_START, ask, f"no answer within {PATIENCE_AT_START} s")


def _within(seconds: float, call: Callable[[], str], otherwise: str) -> str:
    """What `call` returns, or `otherwise` if it takes longer; it then goes on in a thread that holds up no exit."""
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(call()), daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return otherwise
