"""`mount.qtfs`: mounts a directory of the server, and stays behind as the daemon that serves it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from qtfs_client.connection import Engine
from qtfs_client.control import CONTROL_SLOTS, ControlServer, ControlSession
from qtfs_client.daemon import ENDING_SIGNALS, detach
from qtfs_client.drivers import Driver, MountError, choose
from qtfs_client.mountpoint import check_mountpoint, device_of, wait_for_answer
from qtfs_client.options import (
    MountExit,
    MountOptions,
    OptionError,
    parse_command_line,
    parse_words,
    real_mountpoint,
    split_options,
)
from qtfs_client.places import place_of, real_path
from qtfs_client.remote_host import RemoteHost, control_socket, served_from
from qtfs_client.remote_mount import mount_call, translator
from qtfs_common import auth, logs, rundir
from qtfs_common.addresses import TcpAddress
from qtfs_common.config import CLIENT_SCHEMA, DEFAULT_CLIENT_CONFIG, load_config
from qtfs_common.errors import AddressError, ConfigError, QtfsError
from qtfs_common.protocol import LIMITS
from qtfs_common.special import concerned

log = logging.getLogger(__name__)

_PROGRAM = "mount.qtfs"


@functools.cache
def _key(file: str) -> bytes:
    """Read once: after mount.qtfs -N there are other files."""
    return auth.load_key(Path(file))


def _engine(options: MountOptions) -> Engine:
    return Engine(options.server, _key(options.key_file) if options.key_file else None, options.timeout_s)


def _enter_namespace(options: MountOptions, namespace: str) -> MountOptions:
    """Go to the mount namespace of -N, of which nothing is believed or executed. Raises QtfsError."""
    choose(options.driver)  # what it keeps of this namespace has to be opened now
    if options.key_file:
        _key(options.key_file)
    if isinstance(options.server, TcpAddress):
        with contextlib.suppress(OSError, UnicodeError):
            socket.getaddrinfo(options.server.host, options.server.port)  # loads what resolves names
    for rule in concerned(options.rules, options.source):
        if rule.command:
            path = os.fsdecode(b"/" + b"/".join(rule.pattern))
            raise MountError(f"-N: the special rule for {path} has a command, which would be one of that namespace")
    from qtfs_client.drivers.mounting import enter_mount_namespace

    enter_mount_namespace(namespace)
    sys.path.clear()  # no module from there either
    if os.path.isfile("/etc/mtab") and not os.path.islink("/etc/mtab"):
        raise MountError("-N: that namespace keeps /etc/mtab as a file: libfuse would run a program from there for it")
    return dataclasses.replace(options, mountpoint=real_mountpoint(options.mountpoint))


def _open_driver(options: MountOptions) -> Driver:
    """A session on the engine, in the hands of a driver. Raises QtfsError."""
    driver = choose(options.driver)
    if options.propagate and not driver.propagates:
        raise MountError("option 'propagate': the llfuse driver cannot do that")
    engine = _engine(options)
    # More than `threads`: to follow the server's mounts takes a slot, and so does each request that hangs there.
    connection, ticket = engine.mount(
        options.source,
        read_only=options.read_only,
        slots=LIMITS["MAX_SLOTS"],
        control=CONTROL_SLOTS,
        watch=True,
    )
    return driver(options, engine, connection, ticket)


@contextlib.contextmanager
def _controlled(options: MountOptions, driver: Driver) -> Iterator[None]:
    """With a control socket, if it can be had: the mount is of use without one."""
    server = None
    try:
        device = device_of(options.mountpoint)
        if device is not None:
            path = control_socket(rundir.run_directory(options.run_dir), device)
            session = ControlSession(_engine(options), lambda: driver.ticket, options.timeout_s)
            server = ControlServer(
                path, session, driver.forget_name, driver.figures, lazy_cleanup=options.lazy_cleanup
            )
    except (QtfsError, OSError) as error:
        log.warning("no control socket: %s", error)
    try:
        yield
    finally:
        if server is not None:
            server.close()


def _unmount_on_signals(driver: Driver) -> None:
    """SIGTERM, SIGINT and SIGHUP end the mount: what is dirty is written, who still uses it gets ENOTCONN."""

    def unmount(_number: int, _frame: FrameType | None) -> None:
        # In a thread of its own: the one that the signal stopped may hold whatever unmounting needs.
        threading.Thread(target=driver.unmount, daemon=True).start()

    for number in ENDING_SIGNALS:
        signal.signal(number, unmount)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Signals that end us wait for the end of the body."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(options: MountOptions, ready: Callable[[], None]) -> int:
    """Mount, say so by `ready`, and serve until unmounted. The exit status, with the reason on stderr."""
    try:
        driver = _open_driver(options)
        try:
            with _signals_held():
                driver.mount()
                _unmount_on_signals(driver)
            with _controlled(options, driver):
                ready()
                logs.setup(options.log_level, program=_PROGRAM)
                driver.serve()
        except QtfsError:
            raise
        except Exception:
            log.exception("the mount of %s ends", options.mountpoint)
            raise
        finally:
            driver.close()
    except QtfsError as error:
        return _complain(error)
    return MountExit.SUCCESS


def _complain(error: QtfsError) -> int:
    """The message on stderr, and the exit status of mount(8) for it."""
    print(f"{_PROGRAM}: {error}", file=sys.stderr)
    if isinstance(error, OptionError | MountError) or error.exit_code not in (0, MountExit.USAGE):
        return error.exit_code
    if isinstance(error, AddressError | ConfigError):
        return MountExit.USAGE
    return MountExit.FAILURE


def _mount_in_background(options: MountOptions) -> int:
    return detach(lambda ready: _serve(options, ready), lambda: wait_for_answer(options))


def _run(options: MountOptions) -> int:
    if options.namespace is not None:
        options = _enter_namespace(options, options.namespace)
    for word in options.ignored:
        print(f"{_PROGRAM}: option '{word}' is unknown and ignored", file=sys.stderr)
    check_mountpoint(options.mountpoint)
    if options.fake:
        return MountExit.SUCCESS
    if options.foreground:
        return _serve(options, lambda: None)
    return _mount_in_background(options)


def _mount_remotely(command: argparse.Namespace) -> int:
    """`mount -t qtfs.TYPE`: have the server mount something in a directory of a qtfs mount. The exit status."""
    words = [word for text in command.options for word in split_options(text)]
    run_dir = next((word.partition("=")[2] for word in words if word.startswith("run_dir=")), None)
    run_dir = run_dir or load_config(DEFAULT_CLIENT_CONFIG, CLIENT_SCHEMA, required=False).get("run_dir")
    served = served_from(run_dir)
    place = place_of(real_path(command.mountpoint), served)
    if place is None:
        raise MountError(f"{command.mountpoint} is not on a qtfs mount")
    words = [word for word in words if not word.startswith("run_dir=")]
    try:
        type_ = command.type.removeprefix("qtfs.")
        call = mount_call(type_, command.source, place.below, words, translator(place.mount, served))
        if not command.fake:
            with RemoteHost.of_mount(place.mount, run_dir) as host:
                host.mount(call)
    except OSError as error:
        raise MountError(f"{command.mountpoint}: {error.strerror}") from error
    return MountExit.SUCCESS


def main(arguments: Sequence[str] | None = None) -> int:
    """Mount; the exit status is one of mount(8)'s."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        command = parse_words(arguments)
        if command.type.startswith("qtfs."):
            return _mount_remotely(command)
        options = parse_command_line(arguments)
        logs.setup(options.log_level, target="stderr", program=_PROGRAM)
        os.umask(0o022)
        status = _run(options)
        if options.verbose and status == 0:
            print(f"{_PROGRAM}: {options.source} mounted on {options.mountpoint}")
        return status
    except QtfsError as error:
        return _complain(error)
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return MountExit.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
