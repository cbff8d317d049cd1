"""wandb's copy of a run: train/* over train_step, eval/* over eval_step.

A study must not depend on a service: a wandb that is missing or unreachable costs its plots only.
"""

import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from lib.files import first_line

PATIENCE_AT_START = 4  # seconds for the server's first answer
PATIENCE_AT_END = 60  # seconds for what is still to be sent
# wandb's words, in ours.
MODES = {"online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline"}
MODES |= {"disabled": "disabled"}
FALSE = ("", "0", "false", "f", "no", "n", "off")


class WandbCopy:
    """A wandb run, or nothing where there is none; `note` says which, in words for the reader."""

    def __init__(self, asked: str, folder: Path, run_id: str, project: str, config: dict):
        """`asked`: the parameter wandb_mode. `config`: what wandb shows as the run's configuration."""
        self.run = None
        try:
            mode, why = choose_mode(asked)
            start = {"project": project, "name": folder.name, "id": run_id, "dir": str(folder), "config": config}
            if mode == "online":
                try:
                    self._init(mode, start)
                except Exception as error:  # a login that is refused
                    mode, why = "offline", first_line(error)
            if mode == "offline":
                self._init(mode, start)
            self.note = f"wandb: {mode}" + (f" ({why})" if why else "")
        except Exception as error:
            self.run = None
            self.note = f"wandb: not used ({first_line(error)})"

    def _init(self, mode: str, start: dict) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=30)
        self.run = wandb.init(**start, mode=mode, resume="allow", settings=settings)
        for axis, metrics in (("train_step", "train/*"), ("eval_step", "eval/*")):
            self.run.define_metric(axis)
            self.run.define_metric(metrics, step_metric=axis)

    def log(self, values: dict) -> None:
        try:
            if self.run is not None:
                self.run.log(values)
        except Exception as error:
            self.run, self.note = None, f"wandb: stopped ({first_line(error)})"

    def finish(self, exit_code: int) -> None:
        """Close the run, but wait only so long: unreachable, wandb would go on trying for days."""
        if self.run is not None:
            close, late = self.run.finish, f"no end after {PATIENCE_AT_END} s; `wandb sync` can send the rest"
            if problem := _problem(PATIENCE_AT_END, lambda: close(exit_code=exit_code), late):
                self.note = f"wandb: not finished ({problem})"
        self.run = None


def choose_mode(asked: str) -> tuple[str, str]:
    """Online, offline or disabled, and why, if not by the parameter `asked`.

    "auto" obeys WANDB_DISABLED, WANDB_MODE and wandb's settings file. Without a key or a server a run is kept offline.
    """
    said = os.environ.get("WANDB_MODE", "").strip()
    if said:  # wandb reads it too, and raises on spellings that it does not know
        os.environ["WANDB_MODE"] = MODES.get(said.lower(), "offline")
    if asked in ("offline", "disabled"):
        return asked, ""
    if asked == "auto" and os.environ.get("WANDB_DISABLED", "").strip().lower() not in FALSE:
        return "disabled", "by WANDB_DISABLED"
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    settings, why = wandb_setup.singleton().settings, ""
    if asked == "auto":
        mode = os.environ["WANDB_MODE"] if said else MODES[settings.mode]
        why = f"by WANDB_MODE={said}" if said else "by wandb's settings file" if mode != "online" else ""
        if mode != "online":
            return mode, why
    try:
        logged_in = wbauth.authenticate_session(host=settings.base_url, source="", prompt=False, update_session=False)
    except Exception as error:  # a key that can't be one
        return "offline", first_line(error)
    if not logged_in:
        return "offline", "not logged in"
    problem = unreachable(settings.base_url)
    return ("offline", f"{settings.base_url}: {problem}") if problem else ("online", why)


def unreachable(server: str) -> str:
    """Why a server can't be reached, by the proxy of the environment if there is one; empty where it answers."""

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(server, method="HEAD"), timeout=PATIENCE_AT_START).close()
        except urllib.error.HTTPError as answer:  # of the server, or of a proxy that can't reach it
            if answer.code >= 500 or answer.code == 407:
                raise
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLCertVerificationError):  # whom to trust is wandb's to check
                raise

    # Looking up a name has no time limit of its own.
    return _problem(PATIENCE_AT_START, ask, f"no answer within {PATIENCE_AT_START} s")


def _problem(seconds: float, call: Callable[[], None], late: str) -> str:
    """The error of `call`, if any, or `late`: it then goes on in a thread that holds up no exit."""
    said = [late]

    def work() -> None:
        try:
            call()
            said[0] = ""
        except Exception as error:
            said[0] = first_line(getattr(error, "reason", error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return said[0]
