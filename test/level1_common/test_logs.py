"""Logging: levels, where records go, one record one line, and notices to systemd."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import syslog
from collections.abc import Iterator
from pathlib import Path

import pytest

from qtfs_common import logs
from qtfs_common.errors import QtfsError

ROOT = Path(__file__).parents[2]
LOG = logging.getLogger("qtfs.test")


@pytest.fixture(autouse=True)
def restored_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """What goes to syslog."""
    lines: list[tuple[int, str]] = []
    monkeypatch.setattr(syslog, "syslog", lambda priority, text: lines.append((priority, text)))
    return lines


def log_everything() -> None:
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        LOG.log(level, "%s", logging.getLevelName(level))


@pytest.mark.parametrize(
    ("level", "shown"), [("NONE", 0), ("ERROR", 1), ("WARN", 2), ("INFO", 3), ("DEBUG", 4), ("debug", 4), ("Warn", 2)]
)
def test_levels_let_through_what_they_say(sent: list[tuple[int, str]], level: str, shown: int) -> None:
    logs.setup(level, "syslog")
    log_everything()
    assert [text for _, text in sent] == ["DEBUG", "INFO", "WARNING", "ERROR"][4 - shown :]


def test_none_hides_even_the_critical(sent: list[tuple[int, str]]) -> None:
    logs.setup("NONE", "syslog")
    LOG.critical("x")
    assert not sent


def test_an_unknown_level_is_named() -> None:
    for use in (logs.setup, logs.set_level, logs.level_number):
        with pytest.raises(QtfsError, match="unknown log level 'LOUD': use NONE, ERROR, WARN, INFO, DEBUG"):
            use("LOUD")


def test_the_level_changes_while_running(sent: list[tuple[int, str]]) -> None:
    logs.setup("ERROR", "syslog")
    LOG.info("before")
    logs.set_level("info")
    LOG.info("after")
    assert [text for _, text in sent] == ["after"]


def test_a_second_setup_replaces_the_first(sent: list[tuple[int, str]], capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("INFO", "stderr")
    logs.setup("INFO", "syslog")
    LOG.info("once")
    assert [text for _, text in sent] == ["once"]
    assert capsys.readouterr().err == ""


def test_syslog_gets_priorities_and_survives_any_name(sent: list[tuple[int, str]]) -> None:
    logs.setup("DEBUG", "syslog")
    log_everything()
    LOG.critical("odd \udcff")
    assert sent == [
        (syslog.LOG_DEBUG, "DEBUG"),
        (syslog.LOG_INFO, "INFO"),
        (syslog.LOG_WARNING, "WARNING"),
        (syslog.LOG_ERR, "ERROR"),
        (syslog.LOG_CRIT, r"odd \udcff"),
    ]


def test_plain_stderr_names_program_and_level(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    logs.setup("INFO", "stderr", "100%s")
    LOG.warning("near %s", "full")
    assert capsys.readouterr().err == "100%s: WARNING: near full\n"


def test_a_name_cannot_forge_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("INFO", "stderr", "p")
    LOG.info("open %s", "a\n<0>p: ERROR: \x1b[31mforged\r\x85\u2028")
    assert capsys.readouterr().err == "p: INFO: open a\\n<0>p: ERROR: \\x1b[31mforged\\r\\x85\\u2028\n"


CHILD = """
import logging, os, sys
from qtfs_common import logs
{prepare}
logs.setup("DEBUG")
for level in (10, 20, 30, 40, 50):
    logging.log(level, "m%d", level)
try:
    1 / 0
except ZeroDivisionError:
    logging.exception("oops")
"""


def run_child(tmp_path: Path, prepare: str) -> list[str]:
    path = tmp_path / "stderr"
    with path.open("wb") as stderr:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-c", CHILD.format(prepare=prepare)], stderr=stderr, env=environment, check=True
        )
    return path.read_text().splitlines()


def test_the_journal_gets_a_prefix_on_every_line(tmp_path: Path) -> None:
    prepare = "found = os.fstat(2); os.environ['JOURNAL_STREAM'] = f'{found.st_dev}:{found.st_ino}'"
    lines = run_child(tmp_path, prepare)
    assert lines[:5] == ["<7>m10", "<6>m20", "<4>m30", "<3>m40", "<2>m50"]
    assert lines[5] == "<3>oops" and lines[6] == "<3>Traceback (most recent call last):"
    assert all(line.startswith("<3>") for line in lines[5:])


@pytest.mark.parametrize("value", ["1:1", "", "x:y", "1"])
def test_a_journal_that_is_not_stderr_gets_no_prefix(tmp_path: Path, value: str) -> None:
    lines = run_child(tmp_path, f"os.environ['JOURNAL_STREAM'] = {value!r}")
    assert lines[0].endswith("DEBUG: m10")


@pytest.mark.parametrize(
    "lose_stderr", ["os.dup2(os.open('/dev/null', os.O_WRONLY), 2)", "os.close(2)", "sys.stderr = None"]
)
def test_a_daemon_without_stderr_uses_syslog(tmp_path: Path, lose_stderr: str) -> None:
    found = tmp_path / "syslog"
    catch = f"import syslog; syslog.syslog = lambda p, t: print(p, t, file=open({str(found)!r}, 'a')); "
    assert run_child(tmp_path, catch + lose_stderr) == []
    assert found.read_text().splitlines()[:2] == ["7 m10", "6 m20"]


def receive(sock: socket.socket) -> bytes:
    sock.settimeout(5)
    return sock.recv(4096)


def test_notices_reach_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert logs.notify("READY=1\nSTATUS=serving")
        assert receive(systemd) == b"READY=1\nSTATUS=serving"


def test_systemds_own_abstract_socket_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("")  # autobind, unix(7)
        name = systemd.getsockname()
        assert isinstance(name, bytes)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name[1:].decode())
        assert logs.notify("STOPPING=1")
        assert receive(systemd) == b"STOPPING=1"


@pytest.mark.parametrize("value", [None, "", "relative", "vsock:2:1", "/nonexistent/notify", "/" + "x" * 200])
def test_nobody_to_notify_is_no_failure(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    assert logs.notify("READY=1") is False
