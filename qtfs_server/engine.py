"""The engine: listens, runs the worker threads, obeys signals.

SIGHUP reads the whitelist and the special rules again, SIGTERM and SIGINT let the workers finish what they execute and
end the process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qtfs_common import auth, logs, rundir
from qtfs_common.addresses import Address, PcieAddress, ShmAddress, UnixAddress, bound_address, listen_socket
from qtfs_common.errors import QtfsError
from qtfs_common.rings.geometry import Layout
from qtfs_common.special import DEFAULT_RULES, load_special
from qtfs_common.whitelist import load_whitelist
from qtfs_server.errands import Errands
from qtfs_server.policy import install
from qtfs_server.rings import RingListener
from qtfs_server.server import Server

log = logging.getLogger(__name__)

_SIGNALS = {signal.SIGHUP, signal.SIGTERM, signal.SIGINT}
#: Files whose locks local processes of the server contend for, at the same time; the rest is polled.
_LOCK_QUEUERS = 4
_EXPIRY_PERIOD_S = 1.0
_DRAIN_TIMEOUT_S = 10.0


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
    bar_layout: Layout = field(default_factory=Layout)


def raise_descriptor_limit() -> int:
    """Use all the descriptors that we may have; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return min(soft, 1 << 24) if soft != resource.RLIM_INFINITY else 1 << 24


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


@dataclass(frozen=True)
class _Listening:
    """One address that is listened on, by a socket or by shared memory."""

    address: Address
    heard: socket.socket | RingListener

    @contextlib.contextmanager
    def serving(self, server: Server, has_key: bool) -> Iterator[Address]:
        """Let clients come; where, if the kernel chose a port."""
        # Who has a key wants it used. Who may use a Unix socket, or the memory, its own mode says.
        if isinstance(self.heard, RingListener):
            with self.heard.serving(server, False):
                yield self.address
        else:
            server.listen(self.heard.fileno(), has_key and not isinstance(self.address, UnixAddress))
            yield bound_address(self.heard)


@contextlib.contextmanager
def _listening(options: EngineOptions) -> Iterator[list[_Listening]]:
    """Listen on all addresses, each under a lock that names us to a second engine."""
    directory = rundir.run_directory(options.run_dir)
    with contextlib.ExitStack() as stack:
        found = []
        for address in options.listen:
            name = "engine@" + str(address).replace("/", "_") + ".lock"
            stack.enter_context(rundir.lock_file(name[-250:], directory))
            if isinstance(address, PcieAddress | ShmAddress):
                ring = RingListener(address, options.bar_layout, directory)
                stack.callback(ring.close)
                found.append(_Listening(address, ring))
                continue
            sock = stack.enter_context(listen_socket(address))
            sock.setblocking(False)
            if isinstance(address, UnixAddress):
                stack.callback(Path(address.path).unlink, missing_ok=True)
            found.append(_Listening(address, sock))
        yield found


@contextlib.contextmanager
def _pid_file(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    try:
        path.write_text(f"{os.getpid()}\n")
    except OSError as error:
        raise QtfsError(f"pid file {path}: {error.strerror}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _start_threads(server: Server, workers: int) -> list[threading.Thread]:
    threading.stack_size(512 * 1024)
    threads = [threading.Thread(target=server.work, name=f"worker-{i}", daemon=True) for i in range(workers)]
    threads.append(threading.Thread(target=server.wait_for_locks, name="locks", daemon=True))
    threads.append(threading.Thread(target=server.watch_streams, name="streams", daemon=True))
    threads.append(threading.Thread(target=server.watch_mounts, name="mounts", daemon=True))
    queuers = range(_LOCK_QUEUERS)
    threads += [threading.Thread(target=server.queue_for_locks, name=f"lock-queue-{i}", daemon=True) for i in queuers]
    for thread in threads:
        thread.start()
    return threads


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


def _obey_signals(server: Server, options: EngineOptions, signals: socket.socket) -> None:
    """Until it is time to end: reload, expire sessions."""
    signals.settimeout(_EXPIRY_PERIOD_S)
    while True:
        try:
            received = signals.recv(1)[0]
        except TimeoutError:
            server.expire()
            continue
        if received == signal.SIGHUP:
            _reload(options)
        elif received in _SIGNALS:
            log.info("%s: draining", signal.Signals(received).name)
            return


def _drain(server: Server, threads: list[threading.Thread]) -> bool:
    """Let every worker finish its request; False if one is stuck in the backing file system."""
    logs.notify("STOPPING=1")
    server.stop()
    deadline = time.monotonic() + _DRAIN_TIMEOUT_S
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    return not any(thread.is_alive() for thread in threads)


def run(options: EngineOptions, ready: Callable[[list[Address]], None]) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. `ready` is told the addresses once clients can connect.

    Raises QtfsError for what the user has to mend.
    """
    _load_rules(options)
    key = _load_key(options)
    limit = raise_descriptor_limit()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    with _listening(options) as listening, _pid_file(options.pid_file), contextlib.ExitStack() as stack:
        errands = Errands()
        server = Server(carrier=errands, key=key, grace_s=options.grace_s, descriptor_limit=limit)
        addresses = [stack.enter_context(one.serving(server, key is not None)) for one in listening]
        threads = _start_threads(server, options.workers)
        ready(addresses)
        logs.notify("READY=1")
        with _signals() as signals:
            _obey_signals(server, options, signals)
        drained = _drain(server, threads)
        drained = errands.close(_DRAIN_TIMEOUT_S) and drained
    if not drained:
        log.error("a request is stuck in the backing file system; ending all the same")
        logging.shutdown()
        os._exit(0)
    return 0
