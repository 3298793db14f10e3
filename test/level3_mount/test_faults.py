"""What a fuse3 mount makes of broken connections, silent and dying engines, stopped and killed programs.

doc/architecture.md, 4.2 and 4.3, is the promise. The connection runs through a proxy that breaks it where a test wants.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from calling import Caller, calling
from harness.ends import Ends
from harness.engine_process import TRANSPORTS, EngineProcess, everything_below
from harness.fault_proxy import Cut, Fault, Message, no_fault, once, stop, stopped
from harness.kernel_caches import drops
from harness.leaks import environment
from harness.mounts import MountProcess
from harness.waiting import wait_until
from kit import in_child, outcome
from lines import Line, connected

pytestmark = pytest.mark.root

NOBODY = 65534
CAUGHT_SIGNAL_S = 2.0  # how long a caller that caught a signal still waits for success


def timed(call: Callable[[], object]) -> float:
    begun = time.monotonic()
    call()
    return time.monotonic() - begun


# ---- broken connections


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with connected(tmp_path) as made:
        yield made


def test_a_lost_reply_to_forget_answers_nothing_else(tmp_path: Path) -> None:
    with connected(tmp_path, "threads=1") as line:
        names = [f"{number}" for number in range(8)]
        for name in ("gone", *names):
            (line.there / name).touch()
        lost = threading.Event()

        def lose(message: Message) -> Cut:
            lost.set()
            return Cut(0)

        line.proxy.fault = once("reply", "FORGET", lose)
        os.unlink(line.there / "gone")
        assert lost.wait(10)
        for name in names:
            os.unlink(line.there / name)
            assert name not in os.listdir(line.here)
        assert os.listdir(line.here) == []


#: More than a request is sent again at once (exchange.pyx, QUICK_ATTEMPTS).
MANY_CUTS = 12
LONGEST_PAUSE_S = 1.0  # exchange.pyx, LAST_PAUSE_US


@pytest.mark.parametrize(("where", "operation"), [("reply", "LOOKUP"), ("request", "FORGET")])
def test_what_is_granted_is_counted_on_both_sides_after_many_cuts(tmp_path: Path, where: str, operation: str) -> None:
    with connected(tmp_path, f"cache=none,threads=1,run_dir={tmp_path}/run") as line:
        (line.here / "f").touch()
        ends = Ends(line.mount, tmp_path / "run")
        lost: list[Message] = []

        def fault(message: Message) -> Cut | None:
            if (message.where, message.operation) != (where, operation) or len(lost) == MANY_CUTS:
                return None
            lost.append(message)
            return Cut(0)

        line.proxy.fault = fault
        os.stat(line.there / "f")
        os.unlink(line.there / "f")
        wait_until(lambda: len(lost) == MANY_CUTS, "all of them to be lost", 20)
        ends.check_nothing_is_open()


class EachCut:
    """A fault: every message of a kind is cut, at one byte further on each time, the first `most` of them."""

    def __init__(self, where: str, operation: str, most: int = sys.maxsize) -> None:
        self._kind = where, operation
        self._most = most
        self.cuts = 0

    def __call__(self, message: Message) -> Cut | None:
        if (message.where, message.operation) != self._kind or self.cuts == self._most:
            return None
        self.cuts += 1
        return Cut(min(self.cuts - 1, message.length - 1))


@pytest.mark.parametrize("driver", ["fuse3", "llfuse"])
@pytest.mark.parametrize("where", ["request", "reply"])
def test_many_cuts_in_a_row_delay_a_call_and_no_more(tmp_path: Path, where: str, driver: str) -> None:
    with connected(tmp_path, f"driver={driver}") as line:
        line.proxy.fault = fault = EachCut(where, "MKDIR", MANY_CUTS)
        os.mkdir(line.there / "d")
        assert fault.cuts == MANY_CUTS and os.listdir(line.here) == ["d"]


@pytest.mark.parametrize("driver", ["fuse3", "llfuse"])
def test_a_call_that_breaks_every_connection_ends_at_the_timeout_alone(tmp_path: Path, driver: str) -> None:
    timeout_s = 4
    with connected(tmp_path, f"driver={driver},timeout={timeout_s}") as line:
        (line.here / "f").write_text("text")
        line.proxy.fault = fault = EachCut("request", "MKDIR")
        begun = time.monotonic()
        with calling("mkdir", line.there / "d") as caller:
            caller.go()
            assert (line.there / "f").read_text() == "text"
            assert caller.says(20) == "EIO"
        assert time.monotonic() - begun >= timeout_s
        # It took its time between two.
        assert MANY_CUTS <= fault.cuts < 20
        assert os.listdir(line.here) == ["f"]


def test_a_call_that_breaks_every_connection_can_be_killed(tmp_path: Path) -> None:
    with connected(tmp_path, "timeout=0") as line:
        line.proxy.fault = fault = EachCut("request", "MKDIR")
        with calling("mkdir", line.there / "d") as caller:
            caller.go()
            wait_until(lambda: fault.cuts >= MANY_CUTS, "many cuts")
            before = line.proxy.count("reply", "ATTACH")
            # Then there is a channel, over which nothing is sent for a while.
            wait_until(lambda: line.proxy.count("reply", "ATTACH") > before, "a new channel")
            assert caller.kill() < 1
        line.proxy.fault = no_fault
        time.sleep(LONGEST_PAUSE_S + 0.3)  # what nobody waits for is not done late: this is what is tested
        assert line.proxy.count("request", "MKDIR") == 0
        assert os.listdir(line.here) == []


def _append(line: Line) -> Callable[[], None]:
    (line.here / "f").write_bytes(b"first ")
    fd = os.open(line.there / "f", os.O_WRONLY | os.O_APPEND)

    def call() -> None:
        try:
            assert os.write(fd, b"once") == 4
        finally:
            os.close(fd)
        assert (line.here / "f").read_bytes() == b"first once"

    return call


def _mkdir(line: Line) -> Callable[[], None]:
    def call() -> None:
        os.mkdir(line.there / "d")
        assert os.listdir(line.here) == ["d"]

    return call


def _rename(line: Line) -> Callable[[], None]:
    (line.here / "old").touch()

    def call() -> None:
        os.rename(line.there / "old", line.there / "new")
        assert os.listdir(line.here) == ["new"]

    return call


def _unlink(line: Line) -> Callable[[], None]:
    (line.here / "f").touch()

    def call() -> None:
        os.unlink(line.there / "f")
        assert os.listdir(line.here) == []

    return call


def _link(line: Line) -> Callable[[], None]:
    (line.here / "f").touch()

    def call() -> None:
        os.link(line.there / "f", line.there / "g")
        assert sorted(os.listdir(line.here)) == ["f", "g"] and os.stat(line.here / "f").st_nlink == 2

    return call


def _break_twice(line: Line, where: str, operation: str) -> Fault:
    """The event channel breaks and is replaced; the request's own breaks, and again as soon as it is replaced.

    The client then knows of a break that it has not looked for yet, and finds it before it has sent anything.
    """
    slots: list[int | None] = []

    def strike(message: Message) -> Cut:
        before = line.proxy.count("reply", "ATTACH")
        line.proxy.cut_all(lambda pair: pair.is_event_channel)
        wait_until(lambda: line.proxy.count("reply", "ATTACH") > before, "a new event channel")
        slots.append(message.slot)
        return Cut(0)

    first = once(where, operation, strike)

    def fault(message: Message) -> Cut | None:
        if slots and message.where == "reply" and message.operation == "ATTACH" and message.slot == slots[-1]:
            slots.clear()
            return Cut(None, stopped=line.mount.pid)
        return first(message)

    return fault


@pytest.mark.parametrize("where", ["request", "reply"])
def test_two_breaks_in_a_row_and_everything_happens_once(line: Line, where: str) -> None:
    calls = {"WRITE": _append, "MKDIR": _mkdir, "RENAME": _rename, "UNLINK": _unlink, "LINK": _link}
    failures = []
    for operation, prepare in calls.items():
        call = prepare(line)
        before = line.proxy.count("reply", "ATTACH")
        line.proxy.fault = _break_twice(line, where, operation)
        try:
            call()
        except (AssertionError, OSError) as error:
            failures.append(f"{operation}: {error!r}")
        assert line.proxy.count("reply", "ATTACH") >= before + 2, f"{operation}: nothing was broken"
        for path in line.here.iterdir():
            path.rmdir() if path.is_dir() else path.unlink()
        wait_until(lambda: os.listdir(line.there) == [], "the mount to be empty")
    assert not failures


def _cut_at(at: int, where: str, operation: str, lengths: list[int]) -> Fault:
    def strike(message: Message) -> Cut:
        lengths.append(message.length)
        return Cut(at)

    return once(where, operation, strike)


def _cut_everywhere(line: Line, where: str, operation: str, call: Callable[[int], None]) -> int:
    """Make the numbered call with each possible cut of its message; how many there were."""
    number, lengths = 0, [0]
    while number <= lengths[-1]:
        line.proxy.fault = _cut_at(number, where, operation, lengths)
        call(number)
        assert len(lengths) == number + 2, f"{operation} {number} was not cut"
        number += 1
    return number


@pytest.mark.parametrize("where", ["request", "reply"])
def test_a_cut_at_any_byte_and_everything_happens_once(line: Line, where: str) -> None:
    (line.there / "dirs").mkdir()
    made = _cut_everywhere(line, where, "MKDIR", lambda number: os.mkdir(line.there / f"dirs/{number:04}"))
    assert sorted(os.listdir(line.here / "dirs")) == [f"{number:04}" for number in range(made)]

    fd = os.open(line.there / "lines", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    appended = _cut_everywhere(line, where, "WRITE", lambda number: _whole(os.write(fd, b"%04d\n" % number)))
    os.close(fd)
    assert (line.here / "lines").read_text() == "".join(f"{number:04}\n" for number in range(appended))
    assert made > 64 and appended > 40


def _whole(written: int) -> None:
    assert written == 5


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_cut_leaves_the_kernels_caches_alone(tmp_path: Path, transport: str) -> None:
    with connected(tmp_path, f"cache=always,run_dir={tmp_path}/run", transport=transport) as line:
        (line.here / "f").write_text("text")
        dropped = drops()
        assert (line.there / "f").read_text() == "text"
        ends = Ends(line.mount, tmp_path / "run")
        before = line.proxy.count("reply", "LOOKUP"), line.proxy.count("reply", "READ")
        invalidations = ends.client["invalidations"]
        wait_until(lambda: ends.session["event_channel"], "the event channel")
        line.proxy.cut_all()
        wait_until(lambda: ends.client["reconnects"] > 0, "the event channel to be replaced")
        assert (line.there / "f").read_text() == "text"
        after = line.proxy.count("reply", "LOOKUP"), line.proxy.count("reply", "READ")
        assert after == before or drops() != dropped
        assert ends.client["invalidations"] == invalidations
        ends.check_nothing_is_open()


def test_channels_that_come_back_one_by_one_are_no_outage(tmp_path: Path) -> None:
    """Every other attempt fails: if each were waited for longer than the one before, that would be an outage."""
    channels = 9
    held: set[int | None] = set()
    attempts = itertools.count()

    def fault(message: Message) -> Cut | None:
        if (message.where, message.operation) == ("request", "GETATTR") and message.slot not in held:
            held.add(message.slot)
            wait_until(lambda: len(held) == channels, "all callers")
            return Cut(0)
        if (message.where, message.operation) == ("reply", "ATTACH") and len(held) == channels:
            return Cut(0) if next(attempts) % 2 == 0 else None
        return None

    with connected(tmp_path, f"timeout=2,threads={channels}") as line, contextlib.ExitStack() as ended:
        names = [str(number) for number in range(channels)]
        for name in names:
            (line.there / name).touch()
        callers = [ended.enter_context(calling("stat", line.there / name)) for name in names]
        time.sleep(1.1)  # until the kernel trusts no attributes
        line.proxy.fault = fault
        for caller in callers:
            caller.go()
        assert [caller.says() for caller in callers] == ["done"] * channels


def _is_free(kind: str, path: Path) -> bool:
    with path.open("r+b") as file:
        try:
            if kind == "flock":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_locks_of_those_killed_in_an_outage_are_released(tmp_path: Path) -> None:
    """Killed at once, or when the mount has given up; the server learns of it once it can be reached again."""
    locks = [(kind, when) for kind in ("flock", "posix") for when in ("early", "late")]
    with connected(tmp_path, "timeout=2") as line, contextlib.ExitStack() as holders:
        held = {}
        for kind, when in locks:
            (line.here / f"{kind}-{when}").touch()
            path = line.there / f"{kind}-{when}"
            held[kind, when] = holders.enter_context(calling("hold", kind, path))
            assert not _is_free(kind, line.here / path.name)
        with line.proxy.outage():
            for kind in ("flock", "posix"):
                held[kind, "early"].process.kill()
            wait_until(lambda: outcome(os.statvfs, line.there) == "EIO", "the mount to give up")
            for kind in ("flock", "posix"):
                assert held[kind, "late"].kill() < 5
                held[kind, "early"].process.wait(5)
            assert not any(_is_free(kind, line.here / f"{kind}-{when}") for kind, when in locks)
        for kind, when in locks:
            wait_until(lambda: _is_free(kind, line.here / f"{kind}-{when}"), f"{kind} of the one killed {when}")  # noqa: B023


# ---- file systems without access control lists


@contextlib.contextmanager
def shared(area: Path, source: Path) -> Iterator[Path]:
    """`source` mounted with default options."""
    engine = EngineProcess(area / "engine", rules=everything_below(source))
    with engine.running(), MountProcess(engine, source, area / "mnt", "driver=fuse3").running() as mount:
        yield mount.point


def test_proc_can_be_read_by_everybody(tmp_path: Path) -> None:
    with shared(tmp_path, Path("/proc")) as point:
        here = in_child(lambda: Path("/proc/version").read_text(), "/", NOBODY, NOBODY)
        there = in_child(lambda: Path("version").read_text(), str(point), NOBODY, NOBODY)
        assert here == there
        assert in_child(lambda: "sched" in os.listdir("1"), str(point), NOBODY, NOBODY) is True
        theirs = subprocess.Popen(["sleep", "60"], user=NOBODY, group=NOBODY, extra_groups=[], env=environment())
        try:
            there_too = in_child(lambda: os.listdir(str(theirs.pid)), str(point))
            assert sorted([*there_too, "mem"]) == sorted(os.listdir(f"/proc/{theirs.pid}"))  # mem is hidden
            assert in_child(lambda: os.listdir(f"{theirs.pid}/fd"), str(point)) == os.listdir(f"/proc/{theirs.pid}/fd")
        finally:
            theirs.kill()
            theirs.wait()


def test_modes_alone_decide_where_there_are_no_lists(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", plain], check=True)
    try:
        (plain / "d").mkdir(mode=0o755)
        for name, mode in (("d/all", 0o644), ("d/group", 0o640), ("d/none", 0o600)):
            (plain / name).write_text(name)
            (plain / name).chmod(mode)
            os.chown(plain / name, 1001, 2001)
        names = ("d/all", "d/group", "d/none")

        def reads() -> list[str]:
            return [outcome(Path(name).read_text) for name in names]

        with shared(tmp_path, plain) as point:
            for uid, gid in ((NOBODY, NOBODY), (1002, 2001), (1001, 2001), (0, 0)):
                here, there = (in_child(reads, str(place), uid, gid) for place in (plain, point))
                assert here == there, (uid, gid)
            assert in_child(lambda: sorted(os.listdir("d")), str(point), NOBODY, NOBODY) == ["all", "group", "none"]
    finally:
        subprocess.run(["umount", plain], check=True)


# ---- signals


def test_a_program_that_was_stopped_does_not_notice(line: Line) -> None:
    """Stopped in mkdir(2) and write(2) while the engine is, too."""
    (line.here / "f").touch()
    both = threading.Barrier(2, action=lambda: stop(line.engine.pid))

    def stop_engine(message: Message) -> None:
        if message.where == "request" and message.operation in ("MKDIR", "WRITE"):
            both.wait(10)

    line.proxy.fault = stop_engine
    with calling("mkdir", line.there / "d") as mkdir, calling("write", line.there / "f") as write:
        callers = (mkdir.go(), write.go())
        with contextlib.ExitStack() as going_on:
            going_on.callback(os.kill, line.engine.pid, signal.SIGCONT)
            wait_until(
                lambda: both.broken or {("request", "MKDIR"), ("request", "WRITE")} <= set(line.proxy.passed), "both"
            )
            for caller in callers:
                os.kill(caller.process.pid, signal.SIGSTOP)
            silent = mkdir.is_silent_for(CAUGHT_SIGNAL_S + 1)
            for caller in callers:
                os.kill(caller.process.pid, signal.SIGCONT)
            assert silent and mkdir.is_silent_for(0.2) and write.is_silent_for(0.01)
        assert (mkdir.says(), write.says()) == ("done", "done")
    assert (line.here / "d").is_dir() and (line.here / "f").read_bytes() == b"once"


def _asked(line: Line) -> int:
    passed = dict(line.proxy.passed)
    return sum(n for (where, operation), n in passed.items() if where == "request" and operation != "PING")


def test_who_catches_a_signal_gets_eintr_and_who_is_killed_dies(line: Line) -> None:
    for name in ("a", "b"):  # mkdir(2) holds its directory
        (line.there / name).mkdir()
    with calling("mkdir", line.there / "a/d", "catches") as catcher, calling("mkdir", line.there / "b/d") as victim:
        before = _asked(line)
        with stopped(line.engine.pid):
            catcher.go()
            victim.go()
            wait_until(lambda: _asked(line) >= before + 2, "both calls")  # whatever each begins with
            os.kill(catcher.process.pid, signal.SIGALRM)
            begun = time.monotonic()
            assert victim.kill() < 1
            assert catcher.says() == "EINTR"
            assert CAUGHT_SIGNAL_S - 0.1 < time.monotonic() - begun < CAUGHT_SIGNAL_S + 2.5


@contextlib.contextmanager
def executing(line: Line, caller: Caller) -> Iterator[None]:
    """It is in execve(2) and waits for a FLUSH; it holds a lock that several files of its /proc want."""
    before = _asked(line)
    with stopped(line.engine.pid):
        caller.go()
        wait_until(lambda: _asked(line) > before, "the FLUSH")
        yield


def _can_be_read(path: str) -> bool:
    return subprocess.run(["timeout", "-s", "KILL", "1", "cat", path], capture_output=True, check=False).returncode == 0


def test_what_is_looked_at_of_a_caller_does_not_wait_for_it(line: Line) -> None:
    """Of what the driver reads, that is true of status; syscall is for LOOKUP, under which nobody holds that lock."""
    with calling("execute", line.there / "f") as caller:
        of_caller = f"/proc/{caller.process.pid}"
        with executing(line, caller):
            assert _can_be_read(f"{of_caller}/status") and _can_be_read(f"{of_caller}/comm")
            assert not _can_be_read(f"{of_caller}/syscall"), "there is such a lock"
        assert caller.says() == "done"


def test_who_is_killed_in_execve_dies_although_nobody_answers(line: Line) -> None:
    """The worker whose answer it waits for looks whether it was killed, and must not wait in turn."""
    with calling("execute", line.there / "f") as victim, executing(line, victim):
        assert victim.kill() < CAUGHT_SIGNAL_S + 2.5
    (line.there / "g").touch()
    assert (line.here / "g").exists()


# ---- an engine that does not answer, or is gone


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_more_waits_than_can_be_put_aside(line: Line) -> None:
    """The list takes 64 MiB. The rest stays in the kernel, whose device is then readable all the time."""
    count, window_s = 100, 2.0
    before = _resident(line.mount.pid)
    with calling("write_many", line.there, count) as writers:
        with stopped(line.engine.pid):
            writers.go()
            wait_until(lambda: _resident(line.mount.pid) - before > 60 << 20, "the list to be full")
            used = _cpu_s(line.mount.pid)
            assert writers.is_silent_for(window_s)
            assert _cpu_s(line.mount.pid) - used < window_s / 4
        assert writers.says(30) == str(count)
    for number in range(count):
        data = (line.here / str(number)).read_bytes()
        assert len(data) == 1 << 20 and data.count(number) == len(data)
        (line.here / str(number)).unlink()


def test_an_engine_that_dies_under_load(line: Line) -> None:
    """Calls may fail while nobody knows what became of them; none hangs, and then all is well."""
    with calling("churn", line.there, 8, 3) as load:
        load.go()
        wait_until(lambda: line.proxy.count("reply", "MKDIR") > 100, "the load")
        line.engine.kill()
        line.engine.start()
        errors = set(filter(None, load.says(20).split(",")))
    assert errors <= {"EIO", "ESTALE"}
    (line.there / "after").mkdir()
    (line.there / "file").write_text("text")
    assert (line.here / "after").is_dir() and (line.here / "file").read_text() == "text"


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_an_engine_that_is_gone_is_an_error_after_the_timeout(tmp_path: Path, how: str) -> None:
    # A silent engine does not hear DETACH: the session ends with its grace.
    with connected(tmp_path, "timeout=2", grace_s=1) as line, contextlib.ExitStack() as ended:
        caller = ended.enter_context(calling("stat", line.there / "absent"))
        if how == "killed":
            line.engine.kill()
        else:
            ended.enter_context(stopped(line.engine.pid))
        begun = time.monotonic()
        assert caller.go().says() == "EIO"
        assert 1 < time.monotonic() - begun < 6
        assert timed(line.mount.stop) < 10


def test_without_a_timeout_calls_wait_and_can_be_killed(tmp_path: Path) -> None:
    with connected(tmp_path, "timeout=0") as line, calling("stat", line.there / "absent") as silent:
        with stopped(line.engine.pid):
            assert silent.go().is_silent_for(2)
            assert silent.kill() < 1
        (line.there / "d").mkdir()
        with calling("stat", line.there / "absent") as away, calling("stat", line.there / "absent") as patient:
            with line.proxy.outage():
                for caller in (away, patient):
                    assert caller.go().is_silent_for(1)
                assert away.kill() < 1
            assert patient.says() == "ENOENT"


def test_a_terminated_daemon_writes_back_first(line: Line) -> None:
    (line.here / "f").write_bytes(b"\0" * 4096)
    with calling("change_mapping", line.there / "f"):
        process = line.mount.process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        line.mount.process = None
        assert not os.path.ismount(line.there)
        assert (line.here / "f").read_bytes()[:5] == b"DIRTY"
