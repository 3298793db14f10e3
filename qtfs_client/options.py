"""What mount(8) hands to ``mount.qtfs``, turned into :class:`MountOptions`.

``mount.qtfs SOURCE DIR [-sfnvwr] [-N NAMESPACE] [-t TYPE] [-o OPTION,...]``. The command line wins over client.toml,
that over the defaults; among options of one kind the last wins. Sources: mount(8) "EXTERNAL HELPERS" and
"FILESYSTEM-INDEPENDENT MOUNT OPTIONS", fstab(5), systemd.mount(5), mount_flags in libfuse's lib/mount.c.
"""

from __future__ import annotations

import argparse
import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NoReturn

from qtfs_common import __version__
from qtfs_common.addresses import DEFAULT_PORT, Address, TcpAddress, VsockAddress, parse_address
from qtfs_common.config import CLIENT_SCHEMA, DEFAULT_CLIENT_CONFIG, load_config, value_from_text
from qtfs_common.errors import QtfsError
from qtfs_common.special import DEFAULT_LOCAL_PROC, DEFAULT_RULES, Rule, load_special, process_rules

DEFAULT_DRIVER = "auto"
DEFAULT_CACHE = "auto"
DEFAULT_SPECIAL = "remote"
DEFAULT_LOG_LEVEL = "WARN"
#: Seconds without an answer before an operation fails; 0 waits for ever.
DEFAULT_TIMEOUT_S = 30.0
DEFAULT_MAX_READ = 1 << 20
#: Slot channels of a mount, as many as the original had connections.
DEFAULT_CHANNELS = 16


class MountExit(IntEnum):
    """Exit codes of mount(8), section "EXIT STATUS"."""

    SUCCESS = 0
    USAGE = 1
    SYSTEM = 2
    INTERNAL = 4
    INTERRUPTED = 8
    MTAB = 16
    FAILURE = 32
    SOME_SUCCEEDED = 64


class OptionError(QtfsError):
    """The command line cannot be used as it stands."""

    exit_code = MountExit.USAGE


@dataclass(frozen=True, slots=True)
class MountOptions:
    """Everything mount.qtfs needs to know.

    ``source`` is an absolute, normalised path on the server, ``mountpoint`` a real path here. ``kernel_flags`` are for
    libfuse, ``ro`` excluded, ``suid`` and ``dev`` spelt out since libfuse forbids them otherwise; whoever joins them by
    commas escapes those inside (SELinux contexts) with a backslash. ``rules`` are all special rules, of whatever path.
    ``ignored`` are options dropped because of ``-s``.
    """

    source: str
    mountpoint: str
    server: Address
    read_only: bool = False
    kernel_flags: tuple[str, ...] = ()
    driver: str = DEFAULT_DRIVER
    cache: str = DEFAULT_CACHE
    special: str = DEFAULT_SPECIAL
    allow_other: bool = False
    allow_root: bool = False
    timeout_s: float = DEFAULT_TIMEOUT_S
    max_read: int = DEFAULT_MAX_READ
    channels: int = DEFAULT_CHANNELS
    key_file: str | None = None
    run_dir: str | None = None
    log_level: str = DEFAULT_LOG_LEVEL
    lazy_cleanup: bool = False
    rules: tuple[Rule, ...] = ()
    foreground: bool = False
    propagate: bool = False
    poll: bool = True
    fake: bool = False
    verbose: bool = False
    namespace: str | None = None
    ignored: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------- options without a value

#: For mount(8), fstab and systemd only, or meaningless on FUSE, whose inodes the kernel never updates the times of.
_IGNORED_WORDS = frozenset(
    (
        *("defaults", "auto", "noauto", "nofail", "_netdev", "_rnetdev", "nouser", "nousers", "nogroup", "noowner"),
        *("relatime", "norelatime", "nostrictatime", "lazytime", "nolazytime", "mand", "nomand", "iversion"),
        *("noiversion", "silent", "loud"),
    )
)
#: Options of the same kind that may carry a value of any form.
_IGNORED_PREFIXES = ("x-", "X-", "comment=", "user=", "uhelper=", "helper=")

#: What a word sets: names of _Words' fields. As in mount(8), a later "exec" undoes what "user" implied.
_UNSAFE = {"suid": False, "dev": False}
_WORDS: Mapping[str, Mapping[str, Any]] = {
    "ro": {"read_only": True},
    "rw": {"read_only": False},
    "suid": {"suid": True},
    "nosuid": {"suid": False},
    "dev": {"dev": True},
    "nodev": {"dev": False},
    "exec": {"exec": True},
    "noexec": {"exec": False},
    "atime": {"atime": True},
    "noatime": {"atime": False},
    "strictatime": {"atime": True},
    "diratime": {"diratime": True},
    "nodiratime": {"diratime": False},
    "sync": {"sync": True},
    "async": {"sync": False},
    "dirsync": {"dirsync": True},
    "user": {**_UNSAFE, "exec": False},
    "users": {**_UNSAFE, "exec": False},
    "owner": _UNSAFE,
    "group": _UNSAFE,
    "allow_other": {"allow_other": True, "allow_root": False},
    "allow_root": {"allow_other": False, "allow_root": True},
    "noallow_other": {"allow_other": False, "allow_root": False},
    "foreground": {"foreground": True},
    "proc": {"proc": True},
    "propagate": {"propagate": True},
    "nopropagate": {"propagate": False},
    "poll": {"poll": True},
    "nopoll": {"poll": False},
    "lazy_cleanup": {"lazy_cleanup": True},
    "nolazy_cleanup": {"lazy_cleanup": False},
}
_ESCAPES = ("\\,", "\\\\", '\\"')
_TOKEN = re.compile(r'"[^"]*"|\\.?|,|[^,\\"]+|"', re.DOTALL)
_CONTEXTS = ("context", "fscontext", "defcontext", "rootcontext")


@dataclass(slots=True)
class _Words:
    """The state that options without a value set, in the order in which they come."""

    allow_other: bool
    allow_root: bool = False
    read_only: bool = False
    suid: bool = True
    # Not as elsewhere: a device node stands for a device of the server; this machine's must not answer in its place.
    dev: bool = False
    exec: bool = True
    atime: bool = True
    diratime: bool = True
    sync: bool = False
    dirsync: bool = False
    foreground: bool = False
    proc: bool = False
    propagate: bool = False
    poll: bool = True
    lazy_cleanup: bool = False
    contexts: dict[str, str] = field(default_factory=dict)

    def kernel_flags(self, privileged: bool) -> tuple[str, ...]:
        """Words for libfuse; fusermount refuses suid and dev to users, so they are not even asked for."""
        suid, dev = self.suid and privileged, self.dev and privileged
        flags = ["suid" if suid else "nosuid", "dev" if dev else "nodev"]
        chosen = {
            "noexec": not self.exec,
            "noatime": not self.atime,
            "nodiratime": not self.diratime,
            "sync": self.sync,
            "dirsync": self.dirsync,
        }
        flags += [name for name, wanted in chosen.items() if wanted]
        return (*flags, *(f"{name}={value}" for name, value in self.contexts.items()))


# ---------------------------------------------------------------------------------------------------------- parsing


def parse_command_line(
    arguments: Sequence[str], *, default_config: str = DEFAULT_CLIENT_CONFIG, privileged: bool | None = None
) -> MountOptions:
    """The options in ``arguments`` (without the program's name) and in client.toml.

    ``default_config`` need not exist; a file named by ``config=`` must. ``privileged`` is whether we mount as root, by
    default whether we are. Raises QtfsError (OptionError, ConfigError, AddressError), whose exit code is mount(8)'s;
    SystemExit after ``--help`` and ``--version``.
    """
    privileged = os.geteuid() == 0 if privileged is None else privileged
    command = parse_words(arguments)
    _check_type(command.type)
    parsed = _Parsed(_Words(allow_other=privileged), sloppy=command.sloppy)
    for text in command.options:
        parsed.take_all(split_options(text))
    given = parsed.values
    layers = (given, load_config(given.pop("config", default_config), CLIENT_SCHEMA, required="config" in parsed.seen))
    return _assemble(command, parsed, layers, privileged)


def parse_words(arguments: Sequence[str]) -> argparse.Namespace:
    """The words of the command line, unchecked: source, mountpoint, options, type and so on. Raises OptionError."""
    return _parser().parse_intermixed_args(list(arguments))


def split_options(text: str) -> list[str]:
    """The options in an ``-o`` list: between commas, but not those after a backslash or within double quotes.

    A backslash before a comma, a quote or a backslash goes, except within quotes; those stay, as mount(8) puts them
    round SELinux contexts for the kernel. Empty options do not count. An open quote raises OptionError.
    """
    options = [""]
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == ",":
            options.append("")
        elif token == '"':
            raise OptionError(f"options '{text}': a double quote is never closed")
        else:
            options[-1] += token[1] if token in _ESCAPES else token
    return [option for option in options if option]


class _Parser(argparse.ArgumentParser):
    """argparse's own way out is exit code 2, which mount(8) reads as a system error."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}; usage: {self.prog} SOURCE DIR -o server=ADDRESS,...")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mount.qtfs",
        allow_abbrev=False,
        description="Mounts SOURCE, a directory of the server, on DIR.",
        epilog="Example: mount -t qtfs /home /root/mnt -o server=vsock://2:12345",
    )
    parser.add_argument("source", metavar="SOURCE", help="absolute path of a directory on the server")
    parser.add_argument("mountpoint", metavar="DIR", help="directory here")
    parser.add_argument("-o", dest="options", metavar="OPTION,...", action="append", default=[], help="mount options")
    # In one list with -o, so that the last of "-r" and "-o rw" wins.
    parser.add_argument("-r", dest="options", action="append_const", const="ro", help="mount read-only, as -o ro")
    parser.add_argument("-w", dest="options", action="append_const", const="rw", help="mount writable, as -o rw")
    parser.add_argument("-s", dest="sloppy", action="store_true", help="ignore unknown options")
    parser.add_argument("-f", dest="fake", action="store_true", help="check everything, but do not mount")
    parser.add_argument("-n", action="store_true", help="for mount(8): there is no mtab to write")
    parser.add_argument("-v", dest="verbose", action="store_true", help="say what is done")
    parser.add_argument("-N", dest="namespace", metavar="NAMESPACE", help="mount in this mount namespace (pid or path)")
    parser.add_argument("-t", dest="type", metavar="TYPE", default="qtfs", help="qtfs, or qtfs.TYPE: the server mounts")
    parser.add_argument("--version", action="version", version=f"mount.qtfs {__version__}")
    return parser


def _check_type(type_: str) -> None:
    if type_.removeprefix("fuse.").partition(".")[0] != "qtfs":
        raise OptionError(f"file system type '{type_}' is not qtfs")


@dataclass(slots=True)
class _Parsed:
    """Options as taken so far: words, values by key of CLIENT_SCHEMA (and ``config``), and what -s dropped."""

    words: _Words
    sloppy: bool
    values: dict[str, Any] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)

    def take_all(self, options: Iterable[str]) -> None:
        for option in options:
            self._take(option)

    def _take(self, option: str) -> None:
        name, equals, value = option.partition("=")
        if option in _IGNORED_WORDS or option.startswith(_IGNORED_PREFIXES):
            # user=NAME comes from mount(8) when NAME mounts, and implies what user does.
            if name == "user":
                self._set_words("user")
        elif name in _CONTEXTS and value:
            self.words.contexts[name] = value
        elif name in _WORDS:
            if equals:
                raise OptionError(f"option '{name}' takes no value, but got '{value}'")
            self._set_words(name)
        elif name in CLIENT_SCHEMA or name == "config":
            self._set_value(name, equals, value)
        else:
            self._refuse(option)

    def _set_words(self, name: str) -> None:
        for attribute, value in _WORDS[name].items():
            setattr(self.words, attribute, value)

    def _set_value(self, name: str, equals: str, value: str) -> None:
        if not equals or not value:
            raise OptionError(f"option '{name}' needs a value: {name}=...")
        try:
            # A relative config= is meant from where the command runs, and read before anything leaves that directory.
            self.values[name] = value if name == "config" else value_from_text(name, value, CLIENT_SCHEMA)
        except ValueError as error:
            raise OptionError(f"option '{name}': {error}") from error
        self.seen.add(name)

    def _refuse(self, option: str) -> None:
        if option == "remount":
            raise OptionError("option 'remount': a qtfs mount cannot be changed; unmount it and mount it again")
        if not self.sloppy:
            raise OptionError(f"unknown option '{option}'")
        self.ignored.append(option)


# -------------------------------------------------------------------------------------------------------- assembling

Layers = tuple[Mapping[str, Any], Mapping[str, Any]]


def _assemble(command: argparse.Namespace, parsed: _Parsed, layers: Layers, privileged: bool) -> MountOptions:
    words = parsed.words
    if words.propagate and not privileged:
        raise OptionError("option 'propagate': only root can mount what the server mounts")
    return MountOptions(
        source=_check_source(command.source),
        mountpoint=command.mountpoint if command.namespace else real_mountpoint(command.mountpoint),
        server=_server(layers),
        read_only=words.read_only,
        kernel_flags=words.kernel_flags(privileged),
        driver=_pick(layers, DEFAULT_DRIVER, "driver"),
        cache=_pick(layers, DEFAULT_CACHE, "cache"),
        special=_pick(layers, DEFAULT_SPECIAL, "special"),
        allow_other=words.allow_other,
        allow_root=words.allow_root,
        timeout_s=_pick(layers, DEFAULT_TIMEOUT_S, "timeout"),
        max_read=_pick(layers, DEFAULT_MAX_READ, "max_read"),
        channels=_pick(layers, DEFAULT_CHANNELS, "threads", "qtfs_conn_max_conn"),
        key_file=_pick(layers, None, "key_file"),
        run_dir=_pick(layers, None, "run_dir"),
        log_level=_pick(layers, DEFAULT_LOG_LEVEL, "log_level", "qtfs_log_level"),
        lazy_cleanup=words.lazy_cleanup,
        rules=_rules(words.proc, layers),
        foreground=words.foreground,
        propagate=words.propagate,
        poll=words.poll,
        fake=command.fake,
        verbose=command.verbose,
        namespace=command.namespace,
        ignored=tuple(parsed.ignored),
    )


def _pick(layers: Layers, default: Any, *names: str) -> Any:
    """The first of ``names`` in the first layer that has any; ours precede the original's names."""
    return next((layer[name] for layer in layers for name in names if name in layer), default)


def _rules(proc: bool, layers: Layers) -> tuple[Rule, ...]:
    """The shipped rules, if asked for, and then those of the user, who has the last word."""
    file = _pick(layers, None, "special_rules")
    shipped = process_rules(_pick(layers, DEFAULT_LOCAL_PROC, "local_proc").rstrip("/")) if proc else ()
    return (*shipped, *load_special(file or DEFAULT_RULES, required=file is not None))


def _server(layers: Layers) -> Address:
    """The engine's address; whichever layer first names one in any way decides about the host."""
    for layer in layers:
        if "server" in layer:
            return parse_address(layer["server"], _pick(layers, DEFAULT_PORT, "port"))
        if "qtfs_server_ip" in layer:
            return TcpAddress(layer["qtfs_server_ip"], _pick(layers, DEFAULT_PORT, "qtfs_server_port", "port"))
        if "qtfs_server_vsock_cid" in layer:
            port = _pick(layers, DEFAULT_PORT, "qtfs_server_vsock_port", "port")
            return VsockAddress(layer["qtfs_server_vsock_cid"], port)
    raise OptionError(f'no server given: use -o server=ADDRESS, or server = "ADDRESS" in {DEFAULT_CLIENT_CONFIG}')


def _check_source(source: str) -> str:
    if not source.startswith("/"):
        raise OptionError(f"'{source}' is not an absolute path on the server (name the server itself by -o server=)")
    # Dropping "x/.." by text would skip a symbolic link x that only the server can follow.
    if ".." in source.split("/"):
        raise OptionError(f"'{source}' contains '..'")
    return "/" + posixpath.normpath(source).lstrip("/")


def real_mountpoint(mountpoint: str) -> str:
    """The path of a mount point, in the namespace that we are in, without symbolic links. Raises OptionError."""
    resolved = os.path.realpath(mountpoint)
    # Nothing but existence: a mount point may be a file, and a dead mount on it fails every other look.
    try:
        os.lstat(resolved)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise OptionError(f"mount point {mountpoint}: {error.strerror}", MountExit.FAILURE) from error
    except OSError:
        pass
    return resolved
