"""`qtctl`: mounts and processes of the server, from the command line."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from qtfs_client.connection import Engine
from qtfs_client.options import split_options
from qtfs_client.places import Place, QtfsMount, Served, place_of, qtfs_mounts, real_path
from qtfs_client.remote_host import RemoteHost, served_from
from qtfs_client.remote_mount import Translate, mount_call, on_server, translator
from qtfs_common import __version__, auth, logs
from qtfs_common.addresses import DEFAULT_PORT, parse_address
from qtfs_common.config import CLIENT_SCHEMA, DEFAULT_CLIENT_CONFIG, load_config
from qtfs_common.errors import AddressError, ConfigError, QtfsError
from qtfs_common.remote_calls import MOST_MASK_BYTES, ProcessRecord

_PROGRAM = "qtctl"
_EPILOG = """DIR, and SOURCE if it is a path, are paths here, on a qtfs mount; with --server they are the server's.
exit status: 0 done; 1 the server refused, with its reason; 2 a mistake in the command line or the configuration"""

# umount2(2)
_MNT_FORCE = 1
_MNT_DETACH = 2

_MOST_PID = (1 << 31) - 1
_MOST_TICKS = (1 << 64) - 1
_MOST_SIGNAL = 64
_MOST_CPU = 8 * MOST_MASK_BYTES - 1


class _UsageError(QtfsError):
    """The command line cannot be used as it stands."""

    exit_code = 2


def _number(text: str, least: int, most: int) -> int | None:
    """A decimal number of that range; None if the text is none."""
    return int(text) if re.fullmatch("[0-9]{1,20}", text) and least <= int(text) <= most else None


def _between(least: int, most: int) -> Callable[[str], int]:
    """For an argument that is such a number."""

    def check(text: str) -> int:
        number = _number(text, least, most)
        if number is None:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number from {least} to {most}")
        return number

    return check


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Mounts and processes of the server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--mount", metavar="DIR", help="speak through the qtfs mount that DIR lies on")
    parser.add_argument("--server", metavar="ADDRESS", help="speak to the engine there, in a session of its own")
    parser.add_argument("--root", metavar="DIR", help="with --server: directory of the session")
    parser.add_argument("--key-file", metavar="FILE", help="with --server: the key shared with the engine")
    parser.add_argument("--config", metavar="FILE", help=f"defaults (default {DEFAULT_CLIENT_CONFIG})")
    parser.add_argument("--run-dir", metavar="DIR", help="where control sockets are (default /run/qtfs)")
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_mount(commands)
    _add_processes(commands)
    return parser


def _add_mount(commands: Any) -> None:
    mount = commands.add_parser("mount", help="mount on the server; without arguments, list the server's mounts")
    mount.add_argument("-t", dest="type", metavar="TYPE", default="", help="file system type")
    mount.add_argument("-o", dest="options", metavar="OPTION,...", action="append", default=[], help="as of mount(8)")
    mount.add_argument("-r", dest="options", action="append_const", const="ro", help="as -o ro")
    for name in ("bind", "rbind", "move"):
        text = f"as -o {name}"
        mount.add_argument(f"--{name}", dest="options", action="append_const", const=name, help=text)
    for name in ("shared", "private", "slave", "unbindable"):
        for word in (f"make-{name}", f"make-r{name}"):
            text = f"as -o {word}: change the propagation of DIR"
            mount.add_argument(f"--{word}", dest="options", action="append_const", const=word, help=text)
    mount.add_argument("source", metavar="SOURCE", nargs="?", help="what to mount")
    mount.add_argument("directory", metavar="DIR", nargs="?", help="where")
    umount = commands.add_parser("umount", help="unmount on the server")
    umount.add_argument("-l", "--lazy", action="store_true", help="detach it now, and clean up once it is not in use")
    umount.add_argument("-f", "--force", action="store_true", help="even if an NFS server does not answer")
    umount.add_argument("directory", metavar="DIR", help="where something is mounted")


def _add_processes(commands: Any) -> None:
    kill = commands.add_parser("kill", help="send a signal to processes of the server")
    kill.add_argument("-s", "--signal", metavar="SIGNAL", default="TERM", help="name or number (default TERM)")
    kill.add_argument("pids", metavar="PID", type=_between(1, _MOST_PID), nargs="+")
    taskset = commands.add_parser("taskset", help="show or change the processors of a process or thread")
    taskset.add_argument("-c", "--cpu-list", metavar="LIST", help="bind it to these, such as 0-3,8")
    taskset.add_argument("pid", metavar="PID", type=_between(1, _MOST_PID))
    for command in (kill, taskset):
        text = "only if it has this START, see ps"
        command.add_argument("--start", metavar="TICKS", type=_between(0, _MOST_TICKS), default=0, help=text)
    commands.add_parser("ps", help="list the processes that the server lets us reach")


# -------------------------------------------------------------------------------------------------------- the server


class _Target:
    """The server that a command goes to, and how paths are known there."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        explicit = arguments.config is not None
        self._settings = load_config(arguments.config or DEFAULT_CLIENT_CONFIG, CLIENT_SCHEMA, required=explicit)
        if arguments.server and arguments.mount:
            raise _UsageError("--server and --mount exclude each other")

    @property
    def _run_dir(self) -> str | None:
        found: str | None = self._arguments.run_dir or self._settings.get("run_dir")
        return found

    @property
    def _served(self) -> Served:
        return served_from(self._run_dir)

    def for_processes(self) -> RemoteHost:
        """For a command without a path: through the only mount there is, or to the configured engine."""
        if self._arguments.mount:
            return self._through(self._place(self._arguments.mount).mount)
        mounts = qtfs_mounts(self._served)
        if not self._arguments.server and mounts:
            if len({mount.device for mount in mounts}) > 1:
                raise _UsageError("there are several qtfs mounts: say which by --mount")
            return self._through(mounts[0])
        return self._connect(self._arguments.root or "/")

    def for_path(self, directory: str) -> tuple[RemoteHost, bytes, Translate]:
        """For a command about a directory: that too, below the session's root."""
        if self._arguments.server:
            root = self._arguments.root or os.path.dirname(directory.rstrip("/")) or "/"
            if not directory.startswith("/") or not (directory + "/").startswith(root.rstrip("/") + "/"):
                raise _UsageError(f"{directory} is not an absolute path below {root} on the server")
            below = os.fsencode(directory)[len(os.fsencode(root.rstrip("/"))) :].strip(b"/")
            return self._connect(root), below, on_server
        place = self._place(directory)
        return self._through(place.mount), place.below, translator(place.mount, self._served)

    def _place(self, directory: str) -> Place:
        place = place_of(real_path(directory), self._served)
        if place is None:
            raise _UsageError(f"{directory} is not on a qtfs mount")
        return place

    def _through(self, mount: QtfsMount) -> RemoteHost:
        return RemoteHost.of_mount(mount, self._run_dir)

    def _connect(self, root: str) -> RemoteHost:
        text = self._arguments.server or self._settings.get("server")
        if not text:
            raise _UsageError("no server: give --server or --mount")
        key_file = self._arguments.key_file or self._settings.get("key_file")
        key = auth.load_key(Path(key_file)) if key_file else None
        timeout_s = self._settings.get("timeout", 30.0)
        engine = Engine(parse_address(text, self._settings.get("port", DEFAULT_PORT)), key, timeout_s)
        return RemoteHost.connect(engine, root, timeout_s=timeout_s)


# ---------------------------------------------------------------------------------------------------------- commands


def _mount(arguments: argparse.Namespace, target: _Target) -> int:
    words = [word for text in arguments.options for word in split_options(text)]
    if arguments.source is None:
        if words or arguments.type:
            raise _UsageError("mount: SOURCE and DIR are missing")
        return _list_mounts(target)
    source, directory = arguments.source, arguments.directory
    if directory is None:
        # What needs no source names the directory alone: --make-private DIR, -o remount,ro DIR.
        source, directory = "none", source
        if not any(word == "remount" or word.startswith("make-") for word in words):
            raise _UsageError("mount: DIR is missing")
    host, below, translate = target.for_path(directory)
    with host:
        host.mount(mount_call(arguments.type, source, below, words, translate))
    return 0


def _list_mounts(target: _Target) -> int:
    with target.for_processes() as host:
        for mount in host.mounts():
            texts = [os.fsdecode(text) for text in (mount.source, mount.path, mount.type, mount.options)]
            print("{} on {} type {} ({})".format(*map(_printable, texts)))
    return 0


def _umount(arguments: argparse.Namespace, target: _Target) -> int:
    flags = (_MNT_DETACH if arguments.lazy else 0) | (_MNT_FORCE if arguments.force else 0)
    host, below, _ = target.for_path(arguments.directory)
    with host:
        host.umount(below, flags)
    return 0


def _each(pids: Iterable[int], action: Callable[[int], None]) -> int:
    """Do something with each process; the exit status."""
    status = 0
    for pid in pids:
        try:
            action(pid)
        except OSError as error:
            print(f"{_PROGRAM}: {pid}: {error.strerror}", file=sys.stderr)
            status = 1
    return status


def _signal_number(text: str) -> int:
    number = _number(text, 0, _MOST_SIGNAL)
    if number is not None:
        return number
    try:
        return signal.Signals["SIG" + text.upper().removeprefix("SIG")].value
    except KeyError:
        raise _UsageError(f"'{text}' is no signal") from None


def _kill(arguments: argparse.Namespace, target: _Target) -> int:
    number = _signal_number(arguments.signal)
    with target.for_processes() as host:
        return _each(arguments.pids, lambda pid: host.kill(pid, number, arguments.start))


def _cpus(text: str) -> set[int]:
    """Processors of a list as taskset(1) takes it: 0-3,8."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        lowest, highest = _number(first, 0, _MOST_CPU), _number(last if dash else first, 0, _MOST_CPU)
        if lowest is None or highest is None:
            raise _UsageError(f"'{text}' is no list of processors")
        found.update(range(lowest, highest + 1))
    return found


def _cpu_list(cpus: set[int]) -> str:
    """The same the other way round."""
    firsts = sorted(cpu for cpu in cpus if cpu - 1 not in cpus)
    lasts = sorted(cpu for cpu in cpus if cpu + 1 not in cpus)
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))


def _taskset(arguments: argparse.Namespace, target: _Target) -> int:
    wanted = _cpus(arguments.cpu_list) if arguments.cpu_list else None
    with target.for_processes() as host:
        if wanted is not None:
            host.sched_setaffinity(arguments.pid, wanted, arguments.start)
        else:
            print(_cpu_list(host.sched_getaffinity(arguments.pid, arguments.start)))
    return 0


def _row(process: ProcessRecord) -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(process.started_s))
    name = _printable(os.fsdecode(process.name))
    return f"{process.pid:>7} {process.parent:>7} {process.uid:>7} {process.state} {started} {process.start:>12} {name}"


def _ps(arguments: argparse.Namespace, target: _Target) -> int:
    with target.for_processes() as host:
        print(f"{'PID':>7} {'PPID':>7} {'UID':>7} S {'STARTED':<19} {'START':>12} COMMAND")
        for process in host.processes():
            print(_row(process))
    return 0


def _printable(text: str) -> str:
    """Names come from the server, and a terminal obeys control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogateescape").decode() for c in text)


_COMMANDS = {"mount": _mount, "umount": _umount, "kill": _kill, "taskset": _taskset, "ps": _ps}


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = _parser().parse_args(words)
    logs.setup("WARN", target="stderr", program=_PROGRAM)
    try:
        return _COMMANDS[arguments.command](arguments, _Target(arguments))
    except QtfsError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 2 if error.exit_code == 2 or isinstance(error, AddressError | ConfigError) else 1
    except OSError as error:
        print(f"{_PROGRAM}: {arguments.command}: {error.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
