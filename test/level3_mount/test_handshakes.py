"""The handshake of a new mount is cut at every byte: it mounts, or says why not, and soon. The engine keeps nothing.

Handshakes of mounts that are there already: test_seeds.py.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness.engine_process import CHECKOUT, TRANSPORTS, EngineProcess
from harness.fault_proxy import Cut, FaultProxy, Message, Pair
from harness.leaks import environment, mounts_below
from harness.waiting import wait_until

from qtfs_client.connection import Engine, HandshakeError, Ticket
from qtfs_common.auth import load_key

pytestmark = pytest.mark.root

GRACE_S = 1
#: For one handshake, on a busy machine. Nobody waits for a timeout.
SOON_S = 5.0
TIMEOUT_S = 60.0
#: Nobody has to prove anything over a Unix socket.
HANDSHAKES = {"unix": ("HELLO", "MOUNT"), "tcp": ("HELLO", "AUTHENTICATE", "MOUNT")}
MOUNT_FAILURE = 32  # mount(8)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text("a key of this test alone\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def engine(request: pytest.FixtureRequest, tmp_path: Path, key: Path) -> Iterator[EngineProcess]:
    arguments = ("--grace", str(GRACE_S), "--key-file", str(key))
    with EngineProcess(tmp_path / "engine", request.param, arguments=arguments).running() as running:
        yield running
        # Of those that nobody came to, too.
        wait_until(running.is_idle, f"the engine to let everything go; it has {running.figures()}")


def both_ways(transport: str) -> list[tuple[str, str]]:
    return [(where, operation) for operation in HANDSHAKES[transport] for where in ("request", "reply")]


class CutInNext:
    """A fault: of the next connection one message is cut at a byte. What connections before it say comes late."""

    def __init__(self, where: str, operation: str, at: int) -> None:
        self.length: int | None = None
        self._kind = where, operation
        self._at = at
        self._pair: Pair | None = None

    def __call__(self, message: Message) -> Cut | None:
        if self._pair is None and (message.where, message.operation) == ("request", "HELLO"):
            self._pair = message.pair
        if message.pair is not self._pair or (message.where, message.operation) != self._kind:
            return None
        self.length = message.length
        return Cut(self._at)


def check_it_is_of_use(engine: EngineProcess, key: bytes, ticket: Ticket) -> None:
    """What was granted can be used: a slot of the session is attached, which is then left."""
    connection, last = Engine(engine.address, key).attach(ticket, 1)
    assert last == 0
    connection.close()


@pytest.mark.parametrize(("engine", "transport"), [(name, name) for name in TRANSPORTS], indirect=["engine"])
def test_cut_at_any_byte(engine: EngineProcess, transport: str, key: Path, tmp_path: Path) -> None:
    """What a mount calls. Only a reply that has arrived whole makes a session that somebody has."""
    secret = load_key(key)
    succeeded, refused, messages = [], 0, 0
    with FaultProxy(tmp_path / "proxy.sock", engine).running() as proxy:
        client = Engine(proxy.address, secret, TIMEOUT_S)
        for where, operation in both_ways(transport):
            at, length = 0, 0
            messages += 1
            while at <= length:
                proxy.fault = fault = CutInNext(where, operation, at)
                begun = time.monotonic()
                try:
                    connection, ticket = client.mount(str(engine.share), slots=4)
                except HandshakeError as error:
                    assert "the connection broke in the handshake" in str(error)
                    refused += 1
                else:
                    connection.close()
                    check_it_is_of_use(engine, secret, ticket)
                    succeeded.append((where, operation, at == fault.length))
                assert time.monotonic() - begun < SOON_S
                assert fault.length is not None, f"{where} {operation} was not cut at {at}"
                at, length = at + 1, fault.length
    assert succeeded == [("reply", "MOUNT", True)]
    assert refused > 60 * messages
    # Each MOUNT that the engine has executed made one.
    assert len(engine.figures()["sessions"]) > 1


@pytest.mark.parametrize("engine", ["tcp"], indirect=True)
def test_mount_says_why_it_failed(engine: EngineProcess, key: Path, tmp_path: Path) -> None:
    """The command, cut at a byte of each message that is drawn; nothing is mounted, and no process is left."""
    draw = random.Random(3)
    with ExitStack() as stack, ThreadPoolExecutor() as pool:

        def mount(where: str, operation: str, at: int) -> tuple[int, str]:
            name = f"{operation}-{where}"
            proxy = stack.enter_context(FaultProxy(tmp_path / f"{name}.sock", engine).running())
            proxy.fault = CutInNext(where, operation, at)
            point = tmp_path / name
            point.mkdir()
            options = f"server={proxy.address},key_file={key},timeout={TIMEOUT_S:g},run_dir={tmp_path / 'run'}"
            done = subprocess.run(
                [sys.executable, "-m", "qtfs_client.cli", engine.share, point, "-o", options],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False,
                env=environment(PYTHONPATH=str(CHECKOUT)),
            )  # fmt: skip
            assert not os.path.ismount(point)
            return done.returncode, done.stderr

        cases = [(where, operation, draw.randrange(60)) for where, operation in both_ways("tcp")]
        for case, (status, said) in zip(cases, pool.map(lambda case: mount(*case), cases), strict=True):
            assert status == MOUNT_FAILURE, (case, said)
            assert "the connection broke in the handshake" in said and "Traceback" not in said, (case, said)
    assert mounts_below(str(tmp_path)) == []
