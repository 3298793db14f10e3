"""The whitelist: which paths of the server clients may use, and for what.

The format is the C original's: a GLib key file whose groups are the types of :class:`Type` and whose only key is
``Path``, a list separated by ``;``::

    # what libvirt needs
    [Mount]
    Path=/home/VMs;/var/lib/libvirt;
    [Kill]
    Path=qemu-kvm;

Groups and keys may repeat and add up. GLib's escapes (``\\;`` ``\\s`` ``\\t`` ``\\n`` ``\\r`` ``\\\\``) work. Paths are
bytes in any encoding. A mistake anywhere spoils the whole list: half a whitelist is never used.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from qtfs_common.errors import ConfigError
from qtfs_common.files import open_input

DEFAULT_PATH = "/etc/qtfs/whitelist"
_KEY = b"Path"
_PATH_MAX = 4095  # linux/limits.h, less the NUL
_ESCAPES = {b"s": b" ", b"t": b"\t", b"n": b"\n", b"r": b"\r", b"\\": b"\\", b";": b";"}
_ENTRY = re.compile(rb"(?:\\.?|[^\\;])+")
_ESCAPE = re.compile(rb"\\(.?)")


class Type(IntEnum):
    """What a path is allowed for; the numbers are the original's and appear in tables and on the control socket."""

    OPEN = 0
    WRITE = 1
    READ = 2
    READDIR = 3
    MKDIR = 4
    RMDIR = 5
    CREATE = 6
    UNLINK = 7
    RENAME = 8
    SETATTR = 9
    SETXATTR = 10
    MOUNT = 11
    KILL = 12
    UDSCONNECT = 13

    @property
    def group(self) -> str:
        """The group's name in the file: ``Open``, ``Udsconnect``."""
        return self.name.capitalize()


_GROUPS = {type_.group.encode(): type_ for type_ in Type}


@dataclass(frozen=True, slots=True)
class Whitelist:
    """A whitelist as loaded.

    ``paths`` has a key for every type but KILL: absolute, normalised, distinct paths in the file's order, each followed
    by its target if it led through symbolic links when loaded. ``commands`` are the exact names of KILL.
    """

    source: str
    paths: dict[Type, tuple[bytes, ...]] = field(default_factory=dict)
    commands: tuple[bytes, ...] = ()

    def permits(self, type_: Type, path: bytes) -> bool:
        """Whether a rule of ``type_`` is ``path`` or one of its parents; ``path`` is absolute and normalised."""
        return any(_covers(rule, path) for rule in self.paths.get(type_, ()))

    def require_mount(self) -> None:
        """Raises ConfigError if nothing may be mounted: an engine with such a list would refuse every client."""
        if not self.paths.get(Type.MOUNT):
            raise ConfigError(
                self.source,
                "group [Mount] has no path, so no client could mount anything and the engine does not start; "
                "add for instance [Mount] Path=/home;",
            )


def load_whitelist(path: str | os.PathLike[str] = DEFAULT_PATH) -> Whitelist:
    """The whitelist in the file ``path``; raises ConfigError naming the file, and the line where there is one."""
    name = os.fspath(path)
    try:
        with open_input(name) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(name, "the whitelist is not a regular file")
            data = file.read()
    except OSError as error:
        raise ConfigError(name, f"cannot read the whitelist: {error.strerror}") from error
    return parse_whitelist(data, name)


def parse_whitelist(data: bytes, source: str) -> Whitelist:
    """The whitelist in ``data``, read from ``source``; raises ConfigError naming source and line."""
    entries: dict[Type, dict[bytes, None]] = {type_: {} for type_ in Type}  # dicts keep order and drop duplicates
    for line, type_, entry in _entries(data, source):
        if type_ is Type.KILL:
            entries[type_][_check_command(entry, source, line)] = None
            continue
        normal = _check_path(entry, source, line)
        entries[type_][normal] = None
        # The kernel tells the engine real paths; users write /var/run/docker for /run/docker.
        entries[type_][os.path.realpath(normal)] = None
    commands = tuple(entries.pop(Type.KILL))
    return Whitelist(source, {type_: tuple(paths) for type_, paths in entries.items()}, commands)


def _entries(data: bytes, source: str) -> Iterator[tuple[int, Type, bytes]]:
    """Line number, group and text of every entry in the file."""
    type_: Type | None = None
    for line, raw in enumerate(data.split(b"\n"), start=1):
        if b"\0" in raw:
            raise ConfigError(source, "NUL byte", line)
        text = raw.strip()
        if not text or text.startswith(b"#"):
            continue
        if text.startswith(b"["):
            type_ = _parse_group(text, source, line)
            continue
        value = _parse_key(text, source, line)
        if type_ is None:
            raise ConfigError(source, f"'{_show(text)}' stands outside any group", line)
        for entry in _split(value, source, line):
            yield line, type_, entry


def _parse_group(text: bytes, source: str, line: int) -> Type:
    if not text.endswith(b"]"):
        raise ConfigError(source, f"group '{_show(text)}' has no closing bracket", line)
    type_ = _GROUPS.get(text[1:-1])
    if type_ is None:
        known = ", ".join(each.group for each in Type)
        raise ConfigError(source, f"unknown group {_show(text)}; known are {known}", line)
    return type_


def _parse_key(text: bytes, source: str, line: int) -> bytes:
    """The value of a ``Path=value`` line."""
    key, equals, value = text.partition(b"=")
    if not equals:
        raise ConfigError(source, f"'{_show(text)}' is neither [Group] nor Path=...", line)
    if key.rstrip() != _KEY:
        raise ConfigError(source, f"unknown key '{_show(key.rstrip())}'; only Path is known", line)
    return value


def _split(value: bytes, source: str, line: int) -> Iterator[bytes]:
    """The entries between semicolons, blanks around them removed; empty ones do not count."""
    for raw in _ENTRY.findall(value):
        # Before unescaping: blanks at an end are meant if written as \s.
        entry = _ESCAPE.sub(lambda match: _unescape(match.group(1), source, line), raw.strip())
        if entry:
            yield entry


def _unescape(character: bytes, source: str, line: int) -> bytes:
    plain = _ESCAPES.get(character)
    if plain is None:
        raise ConfigError(source, f"unknown escape '\\{_show(character)}'", line)
    return plain


def _check_path(entry: bytes, source: str, line: int) -> bytes:
    """The path without ``//``, ``/./`` and trailing slashes."""
    if not entry.startswith(b"/"):
        raise ConfigError(source, f"'{_show(entry)}' is not an absolute path", line)
    components = [part for part in entry.split(b"/") if part not in (b"", b".")]
    if b".." in components:
        raise ConfigError(source, f"'{_show(entry)}' contains '..'", line)
    normal = b"/" + b"/".join(components)
    if len(normal) > _PATH_MAX:
        raise ConfigError(source, f"path longer than {_PATH_MAX} bytes", line)
    return normal


def _check_command(entry: bytes, source: str, line: int) -> bytes:
    if b"/" in entry:
        raise ConfigError(source, f"'{_show(entry)}' is a path; [Kill] takes names of commands", line)
    return entry


def _covers(rule: bytes, path: bytes) -> bool:
    return rule == b"/" or path == rule or path.startswith(rule + b"/")


def _show(text: bytes) -> str:
    return text.decode("utf-8", "backslashreplace")
