"""The fuse3 driver: mounts through libfuse 3, and speaks the kernel's protocol itself in Cython.

`serve` is the manager of mount_state's description (state.pxd): it starts workers when all are busy, and replaces
channels that break, in the session while the engine knows it and in a new one afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from qtfs_client.connection import Engine, HandshakeError, SessionLostError, Ticket, detach
from qtfs_client.drivers import mount_options
from qtfs_client.drivers.apart import attach, place_of, place_of_fd, take_away
from qtfs_client.drivers.fuse3.following import Follower
from qtfs_client.drivers.fuse3.mount import EVENT_LINE, Mount
from qtfs_client.drivers.fuse3.special import special_rules
from qtfs_client.drivers.mounting import FuseMount, new_mount, start_writing_back
from qtfs_client.options import MountOptions
from qtfs_common.errors import ConnectError, QtfsError
from qtfs_common.protocol import EVENT
from qtfs_common.transport import Connection

log = logging.getLogger(__name__)

_FIRST_WORKERS = 2
#: Between two attempts to reach the engine, doubled each time.
_RETRY_FIRST_S = 0.05
_RETRY_LAST_S = 2.0
#: For one attempt, so that the end of the mount is noticed between two.
_ATTEMPT_S = 5.0
_DETACH_S = 2.0
_WRITE_BACK_S = 5.0
_UNMOUNT_S = 2.0
_STACK_BYTES = 256 * 1024
#: How far the kernel reads ahead, in bytes. More serves who reads in sequence, and costs page faults of who does not.
_READ_AHEAD = 512 * 1024
_JOIN_S = 0.2
#: Makes a thread return from read(/dev/fuse); it does nothing else.
_WAKE_SIGNAL = signal.SIGUSR1


def _read_ahead(device: str, size: int) -> None:
    """Have the kernel read up to `size` bytes ahead of who reads in sequence, in the file system MAJOR:MINOR.

    Source: Documentation/ABI/testing/sysfs-class-bdi. Where we may not change that, as in a container or for another
    user than root, it stays at 128 KiB.
    """
    with contextlib.suppress(OSError):
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(f"{size >> 10}\n")


@contextlib.contextmanager
def _woken_by_signals() -> Iterator[socket.socket]:
    """A socket that becomes readable when a signal comes, also just before somebody sleeps on it: set_wakeup_fd()."""
    receiver, sender = socket.socketpair()
    with receiver, sender:
        receiver.setblocking(False)
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        try:
            yield receiver
        finally:
            signal.set_wakeup_fd(-1)


def _write_back(mountpoints: list[str]) -> None:
    """Write what programs changed in their memory, as far as the server takes it in time.

    By processes: a thread of ours that waits for ourselves would keep the device open when we are killed, and with it
    everybody who waits there. Errors are the business of msync(2).
    """
    until = time.monotonic() + _WRITE_BACK_S
    with contextlib.suppress(OSError):
        for pid in [start_writing_back(mountpoint) for mountpoint in mountpoints]:
            writing = os.pidfd_open(pid)
            ended = select.poll()  # not select(2): a daemon may have more than 1024 descriptors
            ended.register(writing, select.POLLIN)
            ended.poll(max(until - time.monotonic(), 0) * 1000)
            os.close(writing)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, os.WNOHANG)


def _is_told(connection: Connection, slot: int) -> bool:
    """Say DETACH; False: the channel is broken. Raises TimeoutError."""
    try:
        detach(connection, _DETACH_S, slot=slot)
    except TimeoutError:
        raise
    except OSError:
        return False
    return True


class Fuse3Driver:
    """One mount, see qtfs_client.drivers.Driver."""

    propagates = True

    def __init__(
        self, options: MountOptions, engine: Engine, connection: Connection, ticket: Ticket, *, is_child: bool = False
    ) -> None:
        """`is_child`: a mount that another one's `Follower` makes and takes away."""
        self._options = options
        self._is_child = is_child
        self._follower: Follower | None = None
        self._engine = engine.with_timeout(min(options.timeout_s, _ATTEMPT_S) or _ATTEMPT_S)
        self._ticket = ticket
        self._epoch = 1
        self._first: Connection | None = connection  # slot 0 of the session, until it is used
        self._attached: FuseMount | None = None
        self._mount: Mount | None = None
        self._threads: list[threading.Thread] = []
        self._lost_since: float | None = None
        self._interruptions = 0
        self._reconnects = 0  # channels that were replaced
        self._delay_s = _RETRY_FIRST_S
        self._without_thread: int | None = None  # a worker that could not be started

    # ------------------------------------------------------------------------------------------------- the interface

    def forget_name(self, directory: int, name: bytes) -> None:
        """Make the kernel look a name up again."""
        mount = self._mount
        if mount is not None:
            mount.expire_name(directory, name)

    def figures(self) -> dict[str, object]:
        """Counters for the control socket."""
        mount = self._mount
        return {
            "driver": "fuse3",
            "reconnects": self._reconnects,
            "begun_anew": self._epoch - 1,
            "interruptions": self._interruptions,
            **(mount.figures() if mount is not None else {}),
        }

    def mount(self) -> None:
        """Attach the file system to the mount point and agree with the kernel on the protocol. Raises MountError."""
        self._attached = FuseMount(self._options.mountpoint, self._wanted)
        self._take(self._attached.device())
        with contextlib.suppress(OSError):
            self._set_read_ahead(place_of(self._options.mountpoint).device)
        if self._options.special == "remote" and not self.mounted.special_remote:
            log.warning("/proc/PID/syscall cannot be read: FIFOs and devices work as with special=local")
        if not self.mounted.has_triage:
            log.warning("this kernel cannot clone /dev/fuse: signals may wait while all channels are busy")

    def mount_child(self) -> int:
        """The same for a child; the number of the mount in our mountinfo. Raises OSError."""
        device, mounted = new_mount(self._wanted)
        try:
            self._take(device)
            place = place_of_fd(mounted)
            self._set_read_ahead(place.device)
            try:
                attach(mounted, self._options.mountpoint)
            except InterruptedError:
                take_away(self._options.mountpoint, place.mount_id)
                raise
        finally:
            os.close(mounted)
        number: int = place.mount_id
        return number

    @property
    def _wanted(self) -> list[str]:
        """For libfuse."""
        max_read = min(self._options.max_read, self._ticket.max_payload)
        return [*mount_options(self._options), f"max_read={max_read}"]

    def _take(self, device: int) -> None:
        """Serve a device, which is ours from now on, from INIT on."""
        options = self._options
        try:
            rules = special_rules(options.rules, options.source)
        except BaseException:
            os.close(device)
            raise
        channels = self._ticket.slots - (1 if options.propagate and not self._is_child else 0)
        threads = min(options.channels, channels)
        self._mount = Mount(
            device,
            cache=options.cache,
            channels=threads,
            spare_channels=channels - threads,
            timeout_s=options.timeout_s,
            max_payload=self._ticket.max_payload,
            neighbour=self._engine.address.is_loopback,
            owner=os.getuid() if options.allow_root else None,
            special_remote=options.special == "remote",
            polls=options.poll,
            rules=rules,
        )
        self._mount.negotiate()

    def _set_read_ahead(self, device: str) -> None:
        _read_ahead(device, min(self._options.max_read, _READ_AHEAD))

    def serve(self) -> None:
        """Answer the kernel until the file system is unmounted."""
        signal.signal(_WAKE_SIGNAL, lambda _number, _frame: None)
        threading.stack_size(_STACK_BYTES)
        self._follower = Follower(self, self._options, self._engine)
        try:
            with self._follower.running(), _woken_by_signals() as signals:
                self._serve(_FIRST_WORKERS, signals.fileno())
                self._disconnect()
        finally:
            self.mounted.stop()

    def _disconnect(self) -> None:
        """Give the device up. Threads of ours may wait for ourselves, the follower's for one, and nobody serves it."""
        if self._attached is not None:
            self._attached.disconnect()
        if self._mount is not None:
            self._mount.disconnect()

    def serve_child(self) -> None:
        """The same for a child, on a thread of its own."""
        self._serve(1, -1)

    def _serve(self, workers: int, signals: int) -> None:
        mount = self.mounted
        try:
            self._start_events(mount, signals)
            for _ in range(workers):
                self._add_worker(mount)
            while not mount.stopping:
                mount.wait(self._look_after(mount), signals)
        finally:
            mount.stop()
            self._join()

    def _start_events(self, mount: Mount, signals: int) -> None:
        """The thread of the event channel, as soon as the system grants it."""
        while not mount.stopping:
            try:
                self._start(mount.run_events)
                return
            except RuntimeError as error:
                log.warning("the event channel: %s", error)
            mount.wait(self._delay(), signals)

    def unmount(self) -> None:
        """Detach the mount point and end `serve`. Pages that programs changed in their memory are written first."""
        follower, attached = self._follower, self._attached
        if attached is not None:
            _write_back([self._options.mountpoint, *(follower.used() if follower is not None else [])])
            # In a thread of its own: the way there may lead through a mount whose server does not answer.
            leaving = threading.Thread(target=attached.unmount, daemon=True)
            leaving.start()
            leaving.join(_UNMOUNT_S)
        # Not held before: a thread that still waits above when the process ends would keep it from being freed.
        mount = self._mount
        if mount is not None:
            mount.stop()

    def end(self) -> None:
        """End a child, which was taken away from its mount point."""
        if self._mount is not None:
            self._mount.stop()

    def close(self) -> None:
        """Tell the engine that the session is over, and give back the rest."""
        self._detach()
        self._disconnect()
        if self._attached is not None:
            self._attached.unmount()
        self._mount = None

    # ------------------------------------------------------------------------------------------------ for the follower

    @property
    def mounted(self) -> Mount:
        """The mount, after `mount`."""
        assert self._mount is not None
        return self._mount

    @property
    def ticket(self) -> Ticket:
        """Of the session as it is now; it changes with `epoch`."""
        return self._ticket

    @property
    def epoch(self) -> int:
        """Counts the sessions: a server that forgot one is given another."""
        return self._epoch

    @property
    def interruptions(self) -> int:
        """How often the server was out of reach, or forgot the session: names may have been lost then."""
        return self._interruptions

    def _detach(self) -> None:
        """DETACH; without it the engine waits for us to return. A channel that was idle may be broken.

        A server that was out of reach may be back. Children, of which there may be many, do not wait to see.
        """
        connection, slot = self._idle_channel()
        try:
            if connection is not None and _is_told(connection, slot):
                return
            if self._lost_since is None or not self._is_child:
                detach(self._engine.with_timeout(_DETACH_S).attach(self._ticket, 0)[0], _DETACH_S)
        except (OSError, QtfsError) as error:
            log.info("%s could not be told that this mount has ended: %s", self._engine.address, error)

    def _idle_channel(self) -> tuple[Connection | None, int]:
        """A channel that nobody uses any more, if there is one, and its slot. Some mounts end before they have any."""
        if self._first is not None:
            return self._first, 0
        return (self._mount.detached_event_channel() if self._mount is not None else None), EVENT

    # ------------------------------------------------------------------------------------------------------- manager

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _join(self) -> None:
        """Wait for the threads. After `unmount` files may still be open, and the kernel has to be interrupted."""
        for thread in self._threads:
            thread.join(_JOIN_S)
            while thread.is_alive():
                assert thread.ident is not None
                signal.pthread_kill(thread.ident, _WAKE_SIGNAL)
                thread.join(_JOIN_S)

    def _look_after(self, mount: Mount) -> float:
        """Do what there is to do: replace channels, add a worker. Seconds until the next try; -1: there is none."""
        lost = mount.lost()
        if lost and not self._reconnect(mount, lost):
            return self._delay()
        if self._lost_since is not None:
            log.warning("%s: connected again", self._engine.address)
            self._lost_since = None
            mount.set_down(False)
        if mount.wants_worker or self._has_no_worker:
            self._add_worker(mount)
        # Without any worker nobody asks for one.
        return self._delay() if self._has_no_worker else -1

    @property
    def _has_no_worker(self) -> bool:
        return len(self._threads) < 2  # the first is the event channel's

    def _add_worker(self, mount: Mount) -> None:
        """One more worker, if the engine grants a channel and the system a thread; else it will be asked for again."""
        if self._without_thread is None:
            self._without_thread = self._new_worker(mount)
        if self._without_thread is None:
            mount.worker_failed()
            return
        try:
            self._start(mount.run_worker, self._without_thread)
            self._without_thread = None
        except RuntimeError as error:
            log.warning("worker %d: %s", self._without_thread, error)
            mount.worker_failed()

    def _new_worker(self, mount: Mount) -> int | None:
        """A worker on the next slot; it needs a thread. None if that cannot be had now."""
        slot: int = mount.worker_count
        try:
            connection, sequence = self._attach(slot)
            mount.add_worker(connection, self._epoch, sequence)
        except (ConnectError, HandshakeError, MemoryError) as error:
            log.info("no channel %d: %s", slot, error)
            return None
        return slot

    def _attach(self, slot: int) -> tuple[Connection, int]:
        """A channel of the session, and the last sequence number that the engine executed on it."""
        if slot == 0 and self._first is not None:
            connection, self._first = self._first, None
            return connection, 0
        return self._engine.attach(self._ticket, EVENT if slot == EVENT_LINE else slot)

    # ---------------------------------------------------------------------------------------------------- reconnecting

    def _reconnect(self, mount: Mount, lost: list[int]) -> bool:
        """Replace broken channels; False if the engine cannot be reached now."""
        try:
            for slot in lost:
                self._replace(mount, slot)
                self._note_reached(mount)
        except (ConnectError, HandshakeError) as error:
            if self._lost_since is None:
                self._lost_since = time.monotonic()
                self._interruptions += 1
                self._delay_s = _RETRY_FIRST_S
                log.warning("%s: trying again", error)
            timeout_s = self._options.timeout_s
            mount.set_down(timeout_s > 0 and time.monotonic() - self._lost_since > timeout_s)
            return False
        return True

    def _note_reached(self, mount: Mount) -> None:
        """One channel is back: the others have been missing only since now, and are asked for soon."""
        if self._lost_since is not None:
            self._lost_since = time.monotonic()
            self._delay_s = _RETRY_FIRST_S
            mount.set_down(False)

    def _replace(self, mount: Mount, slot: int) -> None:
        try:
            connection, sequence = self._attach(slot)
        except SessionLostError as error:
            log.warning("%s: starting afresh; files that are open are lost", error)
            self._new_session()
            connection, sequence = self._attach(slot)
        self._reconnects += mount.deliver(slot, connection, self._epoch, sequence)

    def _new_session(self) -> None:
        options = self._options
        connection, ticket = self._engine.mount(
            options.source,
            read_only=options.read_only,
            slots=self._ticket.slots,
            control=self._ticket.control,
            watch=True,
            let_go=self._is_child,
        )
        try:
            self._engine.check_payload(ticket.max_payload, self._ticket)
        except HandshakeError:
            connection.close()
            raise
        self._first, self._ticket = connection, ticket
        self._epoch += 1
        self._interruptions += 1

    def _delay(self) -> float:
        """Back-off: how long to wait before the next attempt, in seconds."""
        delay_s, self._delay_s = self._delay_s, min(self._delay_s * 2, _RETRY_LAST_S)
        return delay_s
