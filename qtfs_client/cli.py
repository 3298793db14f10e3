"""`mount.qtfs`: mounts a directory of the server, and stays behind as the daemon that serves it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from qtfs_client.connection import Engine
from qtfs_client.daemon import detach
from qtfs_client.drivers import Driver, MountError, choose
from qtfs_client.mountpoint import check_mountpoint, wait_for_answer
from qtfs_client.options import MountExit, MountOptions, OptionError, parse_command_line
from qtfs_common import auth, logs
from qtfs_common.config import MAX_CONNECTIONS
from qtfs_common.errors import AddressError, ConfigError, QtfsError

log = logging.getLogger(__name__)

_PROGRAM = "mount.qtfs"


def _engine(options: MountOptions) -> Engine:
    key = auth.load_key(Path(options.key_file)) if options.key_file else None
    return Engine(options.server, key, options.timeout_s)


def _open_driver(options: MountOptions) -> Driver:
    """A session on the engine, in the hands of a driver. Raises QtfsError."""
    driver = choose(options.driver)
    if options.propagate and not driver.propagates:
        raise MountError("option 'propagate': the llfuse driver cannot do that")
    engine = _engine(options)
    # To follow the server's mounts takes a slot too.
    slots = min(options.channels + options.propagate, MAX_CONNECTIONS)
    connection, ticket = engine.mount(options.source, read_only=options.read_only, slots=slots, watch=True)
    return driver(options, engine, connection, ticket)


def _unmount_on_signals(driver: Driver) -> None:
    """SIGTERM, SIGINT and SIGHUP end the mount: what is dirty is written, who still uses it gets ENOTCONN."""

    def unmount(_number: int, _frame: FrameType | None) -> None:
        # In a thread of its own: the one that the signal stopped may hold whatever unmounting needs.
        threading.Thread(target=driver.unmount, daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, unmount)


def _serve(options: MountOptions, ready: Callable[[], None]) -> int:
    """Mount, say so by `ready`, and serve until unmounted. The exit status, with the reason on stderr."""
    try:
        driver = _open_driver(options)
        try:
            driver.mount()
            _unmount_on_signals(driver)
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
    status = detach(lambda ready: _serve(options, ready))
    if status == 0:
        wait_for_answer(options)
    return status


def _run(options: MountOptions) -> int:
    if options.namespace is not None:
        choose(options.driver)  # what it keeps of this namespace has to be opened now
        from qtfs_client.drivers.mounting import enter_mount_namespace

        enter_mount_namespace(options.namespace)
    for word in options.ignored:
        print(f"{_PROGRAM}: option '{word}' is unknown and ignored", file=sys.stderr)
    check_mountpoint(options.mountpoint)
    if options.fake:
        return MountExit.SUCCESS
    if options.foreground:
        return _serve(options, lambda: None)
    return _mount_in_background(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Mount; the exit status is one of mount(8)'s."""
    try:
        options = parse_command_line(sys.argv[1:] if arguments is None else arguments)
        logs.setup(options.log_level, target="stderr", program=_PROGRAM)
        os.umask(0o022)
        status = _run(options)
        if options.verbose and status == 0:
            print(f"{_PROGRAM}: {options.source} mounted on {options.mountpoint}")
        return status
    except QtfsError as error:
        return _complain(error)


if __name__ == "__main__":
    sys.exit(main())
