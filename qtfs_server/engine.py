"""The engine: listens, runs the worker threads, obeys signals.

SIGHUP reads the whitelist and the special rules again, SIGTERM and SIGINT let the workers finish what they execute and
end the process. Another engine may take over everything (handover.py): then it ends, too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from qtfs_common import __version__, auth, logs, rundir
from qtfs_common.addresses import Address
from qtfs_common.errors import QtfsError
from qtfs_common.rings.geometry import Layout
from qtfs_common.special import DEFAULT_RULES, load_special
from qtfs_common.whitelist import load_whitelist
from qtfs_server.control import control_name, controlled
from qtfs_server.crew import Crew
from qtfs_server.errands import Errands
from qtfs_server.fd_store import forget, handed_descriptors, is_used, use_store
from qtfs_server.handover import Taken, Takeover, Upgrades, upgrade_path, upgrade_socket
from qtfs_server.listening import listening, place_name
from qtfs_server.mount_records import MountRecords
from qtfs_server.passing import STORED, Passed
from qtfs_server.policy import denials, install
from qtfs_server.server import Server
from qtfs_server.shares import set_limits
from qtfs_server.state_file import use_directory

log = logging.getLogger(__name__)

_SIGNALS = {signal.SIGHUP, signal.SIGTERM, signal.SIGINT}
_EXPIRY_PERIOD_S = 1.0
_DRAIN_TIMEOUT_S = 10.0
_STORE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class EngineOptions:
    """What the engine is to do; times in seconds."""

    listen: tuple[Address, ...]
    workers: int = 16
    whitelist: Path = Path("/etc/qtfs/whitelist")
    special: Path | None = None  # None: the default place, where it need not exist
    key_file: Path | None = None
    pid_file: Path | None = None
    run_dir: Path | None = None
    grace_s: float = 90.0
    max_nodes: int = 1 << 24  # of a session
    max_handles: int = 1 << 20
    bar_layout: Layout = field(default_factory=Layout)
    upgrade: bool = False  # take over from the engine that runs


def raise_descriptor_limit() -> int:
    """Use all the descriptors that we may have; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return min(soft, 1 << 24) if soft != resource.RLIM_INFINITY else 1 << 24


class _Figures:
    """What the control socket tells: doc/control.md."""

    def __init__(self, server: Server, addresses: list[Address]) -> None:
        self._server = server
        self._addresses = [str(address) for address in addresses]
        self._began = time.monotonic()
        self.reloads = 0  # SIGHUPs that were obeyed, with success or not

    def __call__(self) -> dict[str, object]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._began, 3),
            "addresses": self._addresses,
            "reloads": self.reloads,
            "denials": denials(),
            **self._server.figures(),
        }


def _load_rules(options: EngineOptions) -> None:
    whitelist = load_whitelist(options.whitelist)
    whitelist.require_mount()
    install(whitelist, load_special(options.special or DEFAULT_RULES, required=options.special is not None))


def _load_key(options: EngineOptions) -> bytes | None:
    """The shared key, which addresses that other machines can reach over TCP demand."""
    if options.key_file is not None:
        return auth.load_key(options.key_file)
    for address in options.listen:
        if address.requires_authentication:
            raise QtfsError(f"{address} can be reached from outside: it needs a key (--key-file)")
    return None


class _PidFile:
    """Where our process id is to stand. Until it does, a file that is there is another engine's."""

    def __init__(self, path: Path) -> None:
        """Opened before we take over from anybody: where that cannot be, the engine before us goes on."""
        self._path = path
        self._is_ours = not path.exists()
        with self._explained():
            self._file = path.open("ab", buffering=0)

    def write(self) -> None:
        """From now on it is ours. Raises QtfsError."""
        self._is_ours = True
        with self._explained():
            self._file.truncate(0)
            self._file.write(b"%d\n" % os.getpid())

    def close(self) -> None:
        """Take it away, if it is ours."""
        self._file.close()
        if self._is_ours:
            self._path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise QtfsError(f"pid file {self._path}: {error.strerror}") from error


@contextlib.contextmanager
def _pid_file(options: EngineOptions) -> Iterator[Callable[[], None]]:
    """Yields what writes our process id into the file, if there is to be one."""
    if options.pid_file is None:
        yield lambda: None
        return
    with contextlib.closing(_PidFile(options.pid_file)) as file:
        yield lambda: _write_pid(file, options.upgrade)


def _write_pid(file: _PidFile, taken_over: bool) -> None:
    try:
        file.write()
    except QtfsError as error:
        if not taken_over:
            raise
        # No other engine could go on any more.
        log.error("%s", error)


def _reload(options: EngineOptions) -> None:
    """Read the whitelist and the special rules again; with a mistake in either, both stay."""
    logs.notify("RELOADING=1")
    try:
        _load_rules(options)
        log.info("%s read again", options.whitelist)
    except QtfsError as error:
        log.error("the whitelist stays as it was: %s", error)
    logs.notify("READY=1")


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket that says, a byte each, which of _SIGNALS came; they are blocked until then, and again afterwards.

    Not sigtimedwait(): Python's returns garbage if its time is up when SIGCONT interrupts it.
    """
    receiver, sender = socket.socketpair()
    with receiver, sender:
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.fileno())
        for number in _SIGNALS:
            signal.signal(number, lambda _number, _frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        try:
            yield receiver
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            signal.set_wakeup_fd(-1)


@dataclass(frozen=True)
class _Post:
    """What the main thread hears."""

    signals: socket.socket
    upgrades: Upgrades | None

    def next(self) -> int:
        """The number of a signal that came; 0: somebody asks for an upgrade; TimeoutError after a while."""
        poller = select.poll()  # select(2) knows descriptors up to 1023 only
        poller.register(self.signals, select.POLLIN)
        if self.upgrades is not None:
            poller.register(self.upgrades, select.POLLIN)
        readable = [fd for fd, _ in poller.poll(1000 * _EXPIRY_PERIOD_S)]
        if not readable:
            raise TimeoutError
        return self.signals.recv(1)[0] if self.signals.fileno() in readable else 0


def _obey(post: _Post, server: Server, options: EngineOptions, figures: _Figures) -> bool:
    """Until it is time to end: reload, expire sessions. False: another engine has taken over."""
    while True:
        try:
            received = post.next()
        except TimeoutError:
            server.expire()
            continue
        if received == 0 and post.upgrades is not None and post.upgrades.serve_one():
            return False
        if received == signal.SIGHUP:
            _reload(options)
            figures.reloads += 1
        elif received in _SIGNALS:
            log.info("%s: draining", signal.Signals(received).name)
            return True


def _drain(server: Server, crew: Crew, errands: Errands) -> bool:
    """Let every request end; False if one is stuck in the backing file system."""
    logs.notify("STOPPING=1")
    drained = crew.stop(_DRAIN_TIMEOUT_S)
    drained = errands.close(_DRAIN_TIMEOUT_S) and drained
    if is_used() and drained:
        server.store_all()
        crew.come_to_rest(_STORE_TIMEOUT_S)
    return drained


def _go_on(
    server: Server, errands: Errands, options: EngineOptions, names: Iterable[str], given: dict[str, Passed]
) -> None:
    """Keep sessions in the run directory from now on; go on with those that are there, with what is `given` of them."""
    directory = rundir.run_directory(options.run_dir) / "sessions"
    try:
        use_directory(directory, " ".join(names))
    except OSError as error:
        log.warning("%s: %s: sessions will end with this engine", directory, error.strerror)
        return
    server.recover(given)
    _go_on_with_mounts(server, errands, directory)


def _go_on_with_mounts(server: Server, errands: Errands, sessions: Path) -> None:
    """The same with what these sessions have mounted."""
    directory = sessions.with_name("mounts")
    try:
        records = MountRecords(directory, sessions)
        errands.keep_mounts(records, {session["id"] for session in server.figures()["sessions"]})
    except OSError as error:
        log.warning("%s: %s: what clients mount will outlive this engine", directory, error.strerror)


def _go_on_with_stored(server: Server, errands: Errands, options: EngineOptions, names: Iterable[str]) -> None:
    """The same with what systemd has kept of them. What nobody has any use for it keeps no longer."""
    kept = handed_descriptors()
    sessions: dict[str, list[tuple[int, int, int, int]]] = {}
    for (session, index, generation), fd in kept.items():
        sessions.setdefault(session, []).append((STORED, index, generation, fd))
    _go_on(server, errands, options, names, {session: Passed(items) for session, items in sessions.items()})
    for key in kept:
        if not server.is_stored(*key):
            forget(*key)


def _take_over(options: EngineOptions, descriptor_limit: int) -> Taken:
    """What the running engine has, which has ended then. Raises QtfsError, and it goes on."""
    directory = rundir.run_directory(options.run_dir)
    with Takeover(options.listen, directory) as takeover:
        taken = takeover.receive(options.bar_layout, descriptor_limit)
        try:
            use_directory(directory / "sessions", " ".join(map(place_name, options.listen)))
        except OSError as error:
            raise QtfsError(f"{directory / 'sessions'}: {error.strerror}") from error
        takeover.confirm()
    return taken


def _leave() -> NoReturn:
    """End at once, and leave everything as it is."""
    logging.shutdown()
    os._exit(0)


def run(options: EngineOptions, ready: Callable[[list[Address]], None]) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. `ready` is told the addresses once clients can connect.

    Raises QtfsError for what the user has to mend.
    """
    _load_rules(options)
    key = _load_key(options)
    limit = raise_descriptor_limit()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    set_limits(options.max_nodes, options.max_handles)
    directory = rundir.run_directory(options.run_dir)
    with contextlib.ExitStack() as stack:
        write_pid = stack.enter_context(_pid_file(options))
        taken = _take_over(options, limit) if options.upgrade else Taken()
        heard = stack.enter_context(listening(options.listen, options.bar_layout, directory, taken.addresses))
        write_pid()
        errands = Errands()
        errands.mounts.go_on(taken.mounts)
        server = Server(carrier=errands, key=key, grace_s=options.grace_s, descriptor_limit=limit)
        use_store()
        names = [one.place for one in heard]
        if options.upgrade:
            _go_on(server, errands, options, names, taken.sessions)
        else:
            _go_on_with_stored(server, errands, options, names)
        addresses = [stack.enter_context(one.serving(server, key is not None)) for one in heard]
        crew = Crew(server, options.workers)
        crew.start()
        figures = _Figures(server, addresses)
        control_path = directory / control_name(addresses[0])
        control = stack.enter_context(controlled(control_path, figures, taken.control))
        upgrade_sock = stack.enter_context(upgrade_socket(upgrade_path(directory, addresses[0]), taken.upgrade))
        upgrades = Upgrades(upgrade_sock, server, errands, crew, heard, control) if upgrade_sock else None
        ready(addresses)
        logs.notify("READY=1")
        with _signals() as signals:
            if not _obey(_Post(signals, upgrades), server, options, figures):
                _leave()
        if not _drain(server, crew, errands):
            log.error("a request is stuck in the backing file system; ending all the same")
            # The kernel keeps this process, and what it has open, until the request returns.
            server.hang_up()
            _leave()
    return 0
