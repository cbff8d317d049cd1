"""wandb obeys the environment unless the parameter says otherwise, and a study never depends on its server."""

import http.server
import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from wandb.sdk import wandb_setup

from lib.run import wandb_copy
from lib.run.wandb_copy import WandbCopy, choose_mode

KEY = "5ec7e7" + "0" * 34


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Nobody is logged in, and wandb reads its files and variables anew."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(wandb_setup, "_singleton", None)


@pytest.fixture
def server(monkeypatch):
    """A server that answers, though not as wandb's does."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{running.server_address[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", f"http://{address}")
        yield address
        running.shutdown()


@pytest.mark.parametrize(
    ("name", "value", "mode"),
    [
        *(("WANDB_MODE", value, "offline") for value in ("offline", "Offline", " OFFLINE ", "dryrun", "DryRun", "of")),
        *(("WANDB_MODE", value, "disabled") for value in ("disabled", "DISABLED")),
        *(("WANDB_DISABLED", value, "disabled") for value in ("true", "True", "1", "yes", "on", "t", "Y")),
    ],
)
def test_the_environment_is_obeyed(monkeypatch, server, name, value, mode):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_mode("auto") == ("online", "")
    monkeypatch.setenv(name, value)
    found, why = choose_mode("auto")
    assert found == mode and name in why


@pytest.mark.parametrize("value", ["online", "run", "shared", "Online"])
def test_the_environment_may_ask_for_online(monkeypatch, server, value):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", value)
    assert choose_mode("auto") == ("online", f"by WANDB_MODE={value}")


@pytest.mark.parametrize("value", ["", "false", "0", "no", "Off"])
def test_wandb_disabled_may_say_no(monkeypatch, server, value):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_DISABLED", value)
    assert choose_mode("auto") == ("online", "")


@pytest.mark.parametrize("asked", ["online", "offline", "disabled"])
@pytest.mark.parametrize("said", [{"WANDB_MODE": "disabled"}, {"WANDB_MODE": "online"}, {"WANDB_DISABLED": "true"}])
def test_the_parameter_wins(monkeypatch, server, asked, said):
    for name, value in (said | {"WANDB_API_KEY": KEY}).items():
        monkeypatch.setenv(name, value)
    assert choose_mode(asked) == (asked, "")


def test_a_key_that_can_t_be_one_keeps_the_run_offline(monkeypatch, server):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    mode, why = choose_mode("auto")
    assert mode == "offline" and "WANDB_API_KEY" in why


@pytest.mark.parametrize("place", ["home", "NETRC"])
def test_who_is_logged_in_by_a_file_is_online(monkeypatch, server, tmp_path, place):
    assert choose_mode("auto") == ("offline", "not logged in")
    path = tmp_path / ".netrc" if place == "home" else tmp_path / "credentials"
    path.write_text(f"machine {server}\n  login user\n  password {KEY}\n")
    if place == "NETRC":
        monkeypatch.setenv("NETRC", str(path))
    assert choose_mode("auto") == ("online", "")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.2:1")  # of another server
    monkeypatch.setattr(wandb_setup, "_singleton", None)
    assert choose_mode("auto") == ("offline", "not logged in")


@pytest.mark.parametrize("written", ["offline", "disabled", "dryrun"])
def test_wandbs_settings_file_is_obeyed_unless_something_says_otherwise(monkeypatch, server, tmp_path, written):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/settings").write_text(f"[default]\nmode = {written}\n")
    expected = "disabled" if written == "disabled" else "offline"
    assert choose_mode("auto") == (expected, "by wandb's settings file")
    assert choose_mode("online") == ("online", "")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert choose_mode("auto") == ("online", "by WANDB_MODE=online")


@pytest.mark.parametrize("broken", ["closed", "silent", "no such name", "slow name", "proxy"])
@pytest.mark.parametrize("asked", ["auto", "online"])
def test_without_a_connection_a_run_is_kept_offline(monkeypatch, asked, broken):
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    if broken == "closed":
        listener.close()
    if "name" in broken:
        address = "http://wandb.invalid"
    if broken == "slow name":
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(20))
    if broken == "proxy":
        monkeypatch.setenv("http_proxy", address)
        listener.close()
        address = "http://wandb.invalid"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    assert wandb_copy.PATIENCE_AT_START < 5
    monkeypatch.setattr(wandb_copy, "PATIENCE_AT_START", 1)
    started = time.monotonic()
    mode, why = choose_mode(asked)
    assert mode == "offline" and why.startswith(address)
    assert time.monotonic() - started < 2.5
    listener.close()


def test_a_run_kept_offline_can_be_synced(monkeypatch, tmp_path):
    """With the key and the spelling that made a run go online, or end."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "Offline")
    copy = WandbCopy("auto", tmp_path / "n16", "abc123", "a-project", {"n": 16})
    copy.log({"train_step": 1, "train/loss": 2.0})
    copy.finish(0)
    assert copy.note == "wandb: offline (by WANDB_MODE=Offline)"
    assert list((tmp_path / "n16/wandb").glob("offline-run-*-abc123/*.wandb"))


def test_a_login_that_is_refused_leaves_the_run_offline(monkeypatch, tmp_path, server):
    import wandb

    real, asked = wandb.init, []

    def refuse(**settings):
        asked.append(settings["mode"])
        if settings["mode"] == "online":
            raise wandb.errors.AuthenticationError("")
        return real(**settings)

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    copy = WandbCopy("auto", tmp_path / "n16", "abc123", "a-project", {})
    assert asked == ["online", "offline"] and copy.note == "wandb: offline (AuthenticationError)"
    copy.finish(0)


@pytest.mark.parametrize("error", [RuntimeError(), ValueError("\n\n"), OSError("first\nsecond")])
def test_a_wandb_that_cant_start_costs_its_plots_only(monkeypatch, tmp_path, error):
    """An error may have no text, or begin with empty lines."""

    def fail(*_):
        raise error

    monkeypatch.setattr(wandb_copy, "choose_mode", fail)
    copy = WandbCopy("auto", tmp_path, "abc123", "a-project", {})
    copy.log({"train/loss": 1.0})
    copy.finish(1)
    assert copy.run is None and copy.note in (
        f"wandb: not used ({type(error).__name__})",
        "wandb: not used (first)",
    )


def made(run) -> WandbCopy:
    copy = WandbCopy.__new__(WandbCopy)
    copy.run, copy.note = run, ""
    return copy


def test_an_unreachable_wandb_does_not_hold_up_the_end(monkeypatch):
    """wandb waits for days for a server that is gone; the run's own files need none."""
    monkeypatch.setattr(wandb_copy, "PATIENCE_AT_END", 0.2)
    copy = made(SimpleNamespace(finish=lambda exit_code: threading.Event().wait()))
    started = time.monotonic()
    copy.finish(0)
    assert time.monotonic() - started < 5 and "not finished (no end after 0.2 s" in copy.note


def test_a_wandb_that_fails_costs_its_plots_only():
    def fail(*arguments, **settings):
        raise ConnectionError("gone")

    copy = made(SimpleNamespace(log=fail, finish=fail))
    copy.log({"train/loss": 1.0})
    assert copy.run is None and copy.note == "wandb: stopped (gone)"
    copy = made(SimpleNamespace(finish=fail))
    copy.finish(0)
    assert copy.note == "wandb: not finished (gone)"
