"""The content of replaced files: from files and commands, bounded in size and time, nothing left behind."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

import psutil
import pytest
from harness.waiting import wait_until

from qtfs_client import replacements
from qtfs_client.replacements import MAX_CONTENT, content
from qtfs_common.special import Action, Rule


def by_file(path: object) -> Rule:
    return Rule((b"x",), Action.REPLACE, file=str(path))


def by_command(*command: str) -> Rule:
    return Rule((b"x",), Action.REPLACE, command=command)


def get(rule: Rule) -> bytes:
    return content(rule, pid=11, tid=12, name="7")


def failure(rule: Rule) -> int | None:
    with pytest.raises(OSError) as caught:
        get(rule)
    return caught.value.errno


def test_a_file_as_it_is_now(tmp_path: Path) -> None:
    (tmp_path / "f-7").write_bytes(b"one")
    rule = by_file(tmp_path / "f-{name}")
    assert get(rule) == b"one"
    (tmp_path / "f-7").write_bytes(b"two")
    assert get(rule) == b"two"
    (tmp_path / "f-7").unlink()
    assert failure(rule) == errno.ENOENT


def test_what_is_no_file_does_not_make_anybody_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert get(by_file(tmp_path / "fifo")) == b""
    assert failure(by_file(tmp_path)) == errno.EISDIR
    assert get(by_file("/dev/null")) == b""
    assert failure(by_file("/dev/zero")) == errno.EFBIG


def test_a_command_is_argv_and_no_shell() -> None:
    assert get(by_command("/bin/echo", "$HOME", "{pid} {tid}", "; {name}")) == b"$HOME 11 12 ; 7\n"


def test_a_command_has_nothing_of_ours() -> None:
    assert get(by_command("/usr/bin/env")) == f"PATH={os.defpath}\nLC_ALL=C.UTF-8\n".encode()
    assert get(by_command("/bin/pwd")) == b"/\n"
    assert get(by_command("/bin/cat")) == b""


def test_a_command_that_fails_is_an_error(tmp_path: Path) -> None:
    assert failure(by_command("/bin/false")) == errno.EIO
    assert failure(by_command(str(tmp_path / "none"))) == errno.ENOENT
    assert failure(by_command("/bin/sh", "-c", "echo half; kill -9 $$")) == errno.EIO


def test_size_is_bounded() -> None:
    program = "import sys; sys.stdout.write('x' * int(sys.argv[1]))"
    assert len(get(by_command(sys.executable, "-c", program, str(MAX_CONTENT)))) == MAX_CONTENT
    assert failure(by_command(sys.executable, "-c", program, str(MAX_CONTENT + 1))) == errno.EFBIG
    assert failure(by_command("/usr/bin/yes")) == errno.EFBIG


@pytest.mark.parametrize("script", ["sleep 600 & wait", "exec >&-; sleep 600 & wait"], ids=["silent", "closed"])
def test_time_is_bounded_and_nobody_is_left(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(replacements, "COMMAND_TIMEOUT_S", 0.3)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    marker = f"qtfs-marker-{os.getpid()}-{len(script)}"
    begun = time.monotonic()
    assert failure(by_command("/bin/sh", "-c", script, marker)) == errno.ETIMEDOUT
    assert time.monotonic() - begun < 5
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before

    def ended() -> bool:
        return not [p for p in psutil.process_iter(["cmdline"]) if marker in (p.info["cmdline"] or [])]

    wait_until(ended, "the command to be gone")
