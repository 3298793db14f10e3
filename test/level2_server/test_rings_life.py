"""Engines and clients that come and go over shared memory; clients that take the engine for one of another machine."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness import wire
from harness.engine_process import CHECKOUT, EngineProcess
from harness.leaks import environment
from harness.ring_file import (
    BEAT,
    BELL,
    BOOT,
    BY_LINK,
    EPOCH,
    INSTANCE,
    LINE_BEAT,
    MAGIC,
    SLEEPING,
    VERSION,
    RingFile,
    bar_path,
)
from harness.session import Session
from harness.waiting import wait_until
from harness.wire import ROOT

from qtfs_client.connection import Engine, SessionLostError
from qtfs_common.errors import ConnectError
from qtfs_common.rings import shared

MIB = 1 << 20


@pytest.fixture
def own(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine for this test alone, with three channels."""
    arguments = ("--bar-layout", "channels=3,request=256K,reply=256K")
    with EngineProcess(tmp_path / "engine", "shm", arguments=arguments).running() as engine:
        yield engine


@pytest.fixture
def stopped(own: EngineProcess) -> EngineProcess:
    """An engine that has laid its memory out and ended."""
    own.stop()
    return own


def second_engine(own: EngineProcess, path: Path, *arguments: str) -> str:
    """What an engine says that is to serve a file, and cannot."""
    command = [sys.executable, "-m", "qtfs_server.cli", "--listen", f"shm://{path}", "--whitelist", str(own.whitelist)]
    command += ["--run-dir", str(own.area / "run2"), *arguments]
    done = subprocess.run(
        command, env=environment(PYTHONPATH=str(CHECKOUT)), capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode in (1, 2), done
    assert "Traceback" not in done.stderr
    return done.stderr


def refusal(own: EngineProcess, timeout_s: float = 0.5) -> ConnectError:
    """Why nobody can connect."""
    with pytest.raises(ConnectError) as caught:
        Engine(own.address, timeout_s=timeout_s).connect().close()
    return caught.value


@contextlib.contextmanager
def client_process(own: EngineProcess, code: str) -> Iterator[None]:
    """A client in a process of its own, which has run `code` and waits; it is killed at the end."""
    text = "import sys, time; from harness.session import Session; from qtfs_common.rings import shared\n"
    text += code + "\nprint('ready', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", text, str(own.address), str(own.share)],
        env=environment(PYTHONPATH=f"{CHECKOUT}:{CHECKOUT / 'test'}"),
        stdout=subprocess.PIPE,
    ) as client:
        try:
            assert client.stdout is not None and client.stdout.readline() == b"ready\n"
            yield
        finally:
            client.kill()


# ---- the engine's beginning


def test_a_second_engine_finds_the_address_in_use(own: EngineProcess) -> None:
    assert "already in use" in second_engine(own, bar_path(own))
    link = own.area / "another name"
    os.link(bar_path(own), link)
    assert "already in use" in second_engine(own, link), "the lock is the file's, not the path's"
    with Session(own.address, own.share) as session:
        assert session.getattr(ROOT).nlink >= 2


def test_an_engine_of_another_machine_is_known_by_its_beat(stopped: EngineProcess) -> None:
    """As long as its beat goes on; if it stands still, the engine has died there."""
    ending = threading.Event()
    with RingFile(bar_path(stopped)) as ring:
        ring.set(BOOT, 0x1234)
        ring.set(INSTANCE, 77)

        def beat() -> None:
            while not ending.wait(0.05):
                ring.set(BEAT, ring.get(BEAT) + 1)

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            assert "already in use" in second_engine(stopped, bar_path(stopped))
        finally:
            ending.set()
            thread.join()
    stopped.start()
    with Session(stopped.address, stopped.share) as session:
        assert session.getattr(ROOT).nlink >= 2


def test_what_an_engine_cannot_serve(own: EngineProcess, tmp_path: Path) -> None:
    small, fifo, directory, link = (tmp_path / name for name in ("small", "fifo", "directory", "link"))
    small.write_bytes(bytes(100_000))
    os.mkfifo(fifo)
    directory.mkdir()
    link.symlink_to(bar_path(own))
    assert "it is too small: 100000 bytes, and one channel takes 303104 at least" in second_engine(own, small)
    assert "not a regular file" in second_engine(own, fifo)
    assert "Is a directory" in second_engine(own, directory)
    assert "symbolic link" in second_engine(own, link)
    assert "No such file or directory" in second_engine(own, tmp_path / "absent" / "x")
    assert "too long" in second_engine(own, tmp_path / ("x" * 100))
    assert small.read_bytes() == bytes(100_000), "what is not served is not touched"


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of one MiB."""
    place = tmp_path / "full"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)  # our own mapping goes when Python comes to it


@pytest.mark.root
def test_memory_that_is_not_there(own: EngineProcess, full: Path) -> None:
    """A file may be larger than what its file system has: then it is refused at once, and left as it was."""
    said = second_engine(own, full / "made")
    assert "bytes cannot be had: No space left on device" in said
    assert (full / "made").stat().st_size == 0
    with (full / "sparse").open("wb") as file:
        file.truncate(8 * MIB)
    said = second_engine(own, full / "sparse")
    assert f"cannot listen on shm://{full}/sparse: its " in said and "No space left on device" in said
    assert (full / "sparse").stat().st_size == 8 * MIB


@pytest.mark.root
def test_no_page_of_the_layout_is_missing(own: EngineProcess, full: Path) -> None:
    """Who fills the file system up later does not take the memory away."""
    engine = EngineProcess(own.area / "third", "shm", arguments=("--bar-layout", "channels=2,request=160K,reply=160K"))
    engine.listen = f"shm://{full}/bar"
    with engine.running():
        with contextlib.suppress(OSError), (full / "rest").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        with Session(engine.address, engine.share) as session:
            opened = session.create(ROOT, b"file")[1]
            assert session.write(opened.handle, 0, bytes(60000)) == 60000
            assert session.read(opened.handle, 0, 60000) == bytes(60000)


def test_a_layout_that_does_not_fit_or_is_none(own: EngineProcess, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(MIB))
    said = second_engine(own, file, "--bar-layout", "channels=9")
    assert "the layout does not fit: 9 channels take" in said and "and there are 1048576" in said
    assert "'x=9' is not channels=N, request=SIZE or reply=SIZE" in second_engine(own, file, "--bar-layout", "x=9")
    config = tmp_path / "engine.toml"
    config.write_text('bar_layout = "channels=0"\n')
    assert "channels=0: not a number from 1 to 4096" in second_engine(own, file, "--config", str(config))


def test_a_layout_in_the_configuration_file(tmp_path: Path) -> None:
    config = tmp_path / "engine.toml"
    config.write_text('bar_layout = "channels=2,request=160K,reply=200K"\n')
    with EngineProcess(tmp_path / "engine", "shm", arguments=("--config", str(config))).running() as engine:
        with RingFile(bar_path(engine)) as ring:
            assert ring.channels == 2 and ring.reply_area(0) - ring.request_area(0) == 160 * 1024
            assert ring.request_area(1) - ring.reply_area(0) == 200 * 1024
        with Session(engine.address, engine.share) as session:
            assert session.ticket.max_payload == (80 - 8) * 1024


def test_a_file_that_is_there_is_divided_as_it_is(tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path / "engine", "shm")
    with bar_path(engine).open("wb") as file:
        file.truncate(MIB)
    with engine.running(), RingFile(bar_path(engine)) as ring:
        assert (ring.channels, len(ring.map)) == (3, MIB)
        assert bar_path(engine).stat().st_mode & 0o777 == 0o644, "it is its owner's"
    assert not Path(f"{bar_path(engine)}.bell").exists()


def test_the_engines_file_is_its_own(own: EngineProcess) -> None:
    for path in (bar_path(own), Path(f"{bar_path(own)}.bell")):
        assert path.stat().st_mode & 0o777 == 0o600
    own.stop()
    assert bar_path(own).exists() and not Path(f"{bar_path(own)}.bell").exists()


# ---- what a client finds


def test_no_engine(stopped: EngineProcess) -> None:
    refused = refusal(stopped)
    assert refused.errno == errno.ECONNREFUSED and "no engine serves there" in str(refused)
    bar_path(stopped).unlink()
    assert refusal(stopped).errno == errno.ENOENT
    bar_path(stopped).touch()
    assert refusal(stopped).errno == errno.ECONNREFUSED
    bar_path(stopped).unlink()
    os.mkfifo(bar_path(stopped))
    assert "not a regular file" in str(refusal(stopped))


def test_an_engine_that_was_killed(own: EngineProcess) -> None:
    """It leaves its bell behind."""
    own.kill()
    assert Path(f"{bar_path(own)}.bell").exists()
    assert refusal(own).errno == errno.ECONNREFUSED
    own.start()
    with Session(own.address, own.share) as session:
        assert session.getattr(ROOT).nlink >= 2


@pytest.mark.parametrize(
    ("at", "size", "value", "error", "reason"),
    [
        (MAGIC, 8, 1, errno.ECONNREFUSED, "no engine serves there"),
        (VERSION, 4, 2, errno.EPROTONOSUPPORT, "its layout has version 2, and we know 1"),
        (12, 4, 0, errno.EPROTO, "its layout is broken: 0 channels"),
        (12, 4, 1000, errno.EPROTO, "its layout is broken: 1000 channels take"),
        (16, 8, 1 << 40, errno.EPROTO, "its layout is broken: areas of"),
        (24, 8, 4095, errno.EPROTO, "its layout is broken: areas of"),
        (32, 8, 4096, errno.EPROTO, "its layout is broken: the areas do not lie"),
    ],
)
def test_a_control_block_that_is_wrong(
    stopped: EngineProcess, at: int, size: int, value: int, error: int, reason: str
) -> None:
    with RingFile(bar_path(stopped)) as ring:
        ring.set(INSTANCE, 77)
        ring.set(at, value, size)
    refused = refusal(stopped)
    assert refused.errno == error and reason in str(refused)


def test_all_channels_are_taken(own: EngineProcess) -> None:
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(Session(own.address, own.share)) for _ in range(3)]
        refused = refusal(own, 5)
        assert refused.errno == errno.EBUSY and "all 3 channels are taken" in str(refused)
        sessions[1].disconnect()
        stack.enter_context(Session(own.address, own.share))
        assert [session.getattr(ROOT).nlink >= 2 for session in (sessions[0], sessions[2])] == [True, True]


def test_a_client_that_is_killed_frees_its_channels(own: EngineProcess) -> None:
    """At once: no beat has to stop."""
    with client_process(own, "s = Session(*sys.argv[1:]); s.slot(1); s.slot(2)"):
        assert refusal(own).errno == errno.EBUSY
    begun = time.monotonic()
    with Session(own.address, own.share) as session:
        session.slot(1)
        session.slot(2)
    assert time.monotonic() - begun < 2


def test_an_engine_that_forgot_its_sessions_begins_new_ones(own: EngineProcess) -> None:
    session = Session(own.address, own.share)
    own.kill()
    own.forget_sessions()
    own.start()
    with pytest.raises(ConnectionResetError):
        session.getattr(ROOT)
    with pytest.raises(SessionLostError):
        session.reattach()
    session.disconnect()
    with Session(own.address, own.share) as another:
        assert another.getattr(ROOT).nlink >= 2


def test_an_engine_restarts_with_another_layout(own: EngineProcess) -> None:
    """A client that has not noticed yet writes into nobody's area."""
    session = Session(own.address, own.share)
    own.stop()
    own.arguments = ("--bar-layout", "channels=2,request=144K,reply=144K")
    own.start()
    with Session(own.address, own.share) as another, RingFile(bar_path(own)) as ring:
        before = ring.map[ring.request_area(0) :]
        with pytest.raises(ConnectionResetError):
            session.getattr(ROOT)
        assert ring.map[ring.request_area(0) :] == before
        assert another.getattr(ROOT).nlink >= 2
    session.disconnect()


def test_an_engine_that_is_stopped_and_goes_on(own: EngineProcess) -> None:
    assert own.process is not None
    with Session(own.address, own.share) as session:
        own.process.send_signal(signal.SIGSTOP)
        try:
            assert refusal(own).errno == errno.ETIMEDOUT
            session.slot().send("GETATTR", wire.caller(ROOT) + bytes(16))
        finally:
            own.process.send_signal(signal.SIGCONT)
        assert session.slot().receive().error == 0
        assert session.getattr(ROOT).nlink >= 2
        with Session(own.address, own.share) as another:
            assert another.getattr(ROOT).nlink >= 2


# ---- memory that is taken away, or written over


@pytest.mark.parametrize("how", ["truncated", "overwritten", "usurped"])
def test_the_engine_lays_it_out_again(own: EngineProcess, how: str) -> None:
    own.expect_log("the memory is gone")
    session = Session(own.address, own.share)
    with RingFile(bar_path(own)) as ring:
        if how == "truncated":
            os.truncate(bar_path(own), 0)
        else:
            ring.set(MAGIC if how == "overwritten" else INSTANCE, 1)
        wait_until(lambda: "the memory is back" in own.log(), "the engine to take it again")
    with pytest.raises(OSError, match="reset by peer"):
        session.getattr(ROOT)
    session.reattach()
    assert session.getattr(ROOT).nlink >= 2
    session.detach()
    wait_until(own.is_idle, "the engine to let everything go")


def test_an_idle_engine_and_client_take_no_time(own: EngineProcess) -> None:
    process = psutil.Process(own.pid)
    with Session(own.address, own.share) as session:
        session.getattr(ROOT)
        before = sum(process.cpu_times()[:2]) + sum(os.times()[:2])
        with pytest.raises(TimeoutError):
            session.slot().connection.receive(1.5)
        assert sum(process.cpu_times()[:2]) + sum(os.times()[:2]) - before < 0.15


# ---- a client of another machine


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """We are another machine from now on, and map anew."""
    shared._mappings.clear()
    monkeypatch.setattr(shared, "boot_id", lambda: bytes(16))
    yield
    shared._mappings.clear()


@pytest.mark.usefixtures("far")
def test_a_client_of_another_machine(own: EngineProcess) -> None:
    data = os.urandom(65_536)
    with Session(own.address, own.share) as session, RingFile(bar_path(own)) as ring:
        assert ring.get(ring.client_line(0) + BELL, 4) == 2
        handle = session.create(ROOT, b"f")[1].handle
        for size in (0, 1, 5000, 65_536) * 5:
            assert session.write(handle, 0, data[:size]) == size
            assert session.read(handle, 0, size) == data[:size]
        # Both sides sleep, and are woken by their own link.
        asleep = ring.client_line(0) + SLEEPING, ring.engine_line(0) + SLEEPING
        with pytest.raises(TimeoutError):
            session.slot().connection.receive(0.3)
        assert ring.get(asleep[1], 4) & 1
        begun = time.monotonic()
        assert session.getattr(ROOT).nlink >= 2
        assert time.monotonic() - begun < 1
        assert ring.get(asleep[0], 4) & BY_LINK
        beat = ring.get(ring.client_line(0) + LINE_BEAT)
        wait_until(lambda: ring.get(ring.client_line(0) + LINE_BEAT) > beat, "the client's beat")
    wait_until(own.is_idle, f"the engine to let everything go; it has {own.figures()}")


def test_clients_of_two_machines_take_different_channels(own: EngineProcess, request: pytest.FixtureRequest) -> None:
    """Locks do not reach from one machine to the other: the test gives the near client's back."""
    with Session(own.address, own.share) as near, RingFile(bar_path(own)) as ring:
        request.getfixturevalue("far")
        request.getfixturevalue("monkeypatch").setattr(shared, "CHANNEL_LOCKS_AT", 5000)
        with Session(own.address, own.share) as there:
            assert ring.served() == [0, 1]
            for _ in range(50):
                assert near.getattr(ROOT).nlink == there.getattr(ROOT).nlink


@pytest.mark.usefixtures("far")
def test_a_far_client_notices_that_the_engine_was_restarted(own: EngineProcess) -> None:
    session = Session(own.address, own.share)
    own.kill()
    refused = refusal(own, 3)
    assert refused.errno == errno.ECONNREFUSED and "its beat has stopped" in str(refused)
    own.start()
    with pytest.raises(ConnectionResetError):
        session.getattr(ROOT)
    session.disconnect()
    with Session(own.address, own.share) as another:
        assert another.getattr(ROOT).nlink >= 2


def test_the_death_of_a_far_client_is_noticed_by_its_beat(own: EngineProcess) -> None:
    """And its claim, which stays in the memory, is not taken up again."""
    with client_process(own, "shared.boot_id = lambda: bytes(16); s = Session(*sys.argv[1:])"):
        pass
    with RingFile(bar_path(own)) as ring:
        epoch = ring.get(ring.client_line(0) + EPOCH)
        assert epoch and ring.served() == [0]
        wait_until(lambda: not ring.served(), "the engine to give the channel up", 10)
        assert own.figures()["connections"] == 0
        with Session(own.address, own.share), Session(own.address, own.share):
            assert ring.get(ring.client_line(0) + EPOCH) != epoch
