"""Options as mount(8) writes them, for a mount that the server is to make: `mount -t qtfs.TYPE -o OPTIONS SPEC DIR`.

TYPE is a file system of the server, or one of `bind`, `rbind`, `move` and `none`, since mount(8) would carry out -o
bind by itself. SPEC, and options that are paths, may lie on the same qtfs mount as DIR; what does not is a path, or
whatever the file system takes, of the server. Sources: mount(8), mount_setattr(2), overlayfs in the kernel's
documentation.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from qtfs_client.options import OptionError
from qtfs_client.places import QtfsMount, Served, place_of, real_path
from qtfs_common.remote_calls import Action, MountCall, MountFlag, Option, OptionKind

#: A path of the user: whether it lies below the session's root, and how the server knows it.
Translate = Callable[[bytes], tuple[bool, bytes]]

_RDONLY = 1
_ATIME = 0x70
#: Attributes that a word sets and clears, MOUNT_ATTR_* of <linux/mount.h>.
_ATTRIBUTES = {
    "ro": (_RDONLY, 0),
    "rw": (0, _RDONLY),
    "nosuid": (2, 0),
    "suid": (0, 2),
    "nodev": (4, 0),
    "dev": (0, 4),
    "noexec": (8, 0),
    "exec": (0, 8),
    "relatime": (0, _ATIME),
    "noatime": (0x10, _ATIME),
    "strictatime": (0x20, _ATIME),
    "nodiratime": (0x80, 0),
    "diratime": (0, 0x80),
    "nosymfollow": (0x200000, 0),
    "symfollow": (0, 0x200000),
}
_ACTIONS = {
    "bind": (Action.BIND, MountFlag(0)),
    "rbind": (Action.BIND, MountFlag.RECURSIVE),
    "move": (Action.MOVE, MountFlag(0)),
}
_MS_REC = 1 << 14
_PROPAGATIONS = {"unbindable": 1 << 17, "private": 1 << 18, "slave": 1 << 19, "shared": 1 << 20}
#: For mount(8), fstab and systemd, or implied: a loop device is made for every image file.
_IGNORED = re.compile(
    r"(defaults|(no)?auto|nofail|_netdev|loop|silent|loud|(no)?(user|users|group|owner)|user=.*|comment=.*|[xX]-.*"
    r"|async|norelatime|nostrictatime|nolazytime|nomand)\Z"
)
#: Options whose value is a path; several, between colons, of overlayfs' lower directories.
_PATHS = frozenset(("upperdir", "workdir", "lowerdir+", "datadir+", "journal_path", "logdev", "rtdev", "device"))
_LAYER = re.compile(rb"(?:\\.|[^:\\])+")
_NETWORK = frozenset(("nfs", "nfs4", "cifs", "smb3", "ceph"))


@dataclass
class _Wish:
    """What the words say, in the order in which they come."""

    remount: bool = False
    bind: tuple[Action, MountFlag] | None = None
    attributes_set: int = 0
    attributes_clear: int = 0
    propagation: int = 0
    lazy_cleanup: bool = False
    read_only: bool = False
    options: list[str] = field(default_factory=list)

    def take(self, word: str) -> None:
        propagation = word.removeprefix("make-")
        if word in _ATTRIBUTES:
            wanted, unwanted = _ATTRIBUTES[word]
            self.attributes_set = self.attributes_set & ~unwanted | wanted
            self.attributes_clear = self.attributes_clear & ~wanted | unwanted
        elif word in _ACTIONS:
            self.bind = _ACTIONS[word]
        elif word == "remount":
            self.remount = True
        elif word in ("lazy_cleanup", "nolazy_cleanup"):
            self.lazy_cleanup = word == "lazy_cleanup"
        elif propagation.removeprefix("r") in _PROPAGATIONS:
            self.propagation = _PROPAGATIONS[propagation.removeprefix("r")]
            self.propagation |= _MS_REC if propagation.startswith("r") else 0
        elif not _IGNORED.fullmatch(word):
            self.options.append(word)


def translator(mount: QtfsMount, served: Served) -> Translate:
    """How paths here are known to the server that a qtfs mount is of."""

    def translate(path: bytes) -> tuple[bool, bytes]:
        real = real_path(path)
        place = place_of(real, served)
        if place is None:
            if not path.startswith(b"/"):
                raise OptionError(f"'{os.fsdecode(path)}' is neither on the mount nor an absolute path of the server")
            return False, path
        if place.mount.device != mount.device:
            raise OSError(errno.EXDEV, f"{os.fsdecode(path)} lies on another qtfs mount")
        return True, place.below

    return translate


def on_server(path: bytes) -> tuple[bool, bytes]:
    """The Translate of who has no mount here: every path is the server's."""
    if not path.startswith(b"/"):
        raise OptionError(f"'{os.fsdecode(path)}' is not an absolute path of the server")
    return False, path


def mount_call(type_: str, source: str, target: bytes, words: Iterable[str], translate: Translate) -> MountCall:
    """The call for a mount(8) command; `target` is below the session's root. Raises OptionError, OSError."""
    wish = _Wish()
    if type_ in _ACTIONS:
        wish.take(type_)
    for word in words:
        wish.take(word)
    if wish.remount:
        return _remount(wish, target)
    if wish.bind is not None:
        return _bind(wish, source, target, translate)
    if type_ == "none" or not type_:
        if not wish.propagation:
            raise OptionError("nothing to do: name a file system type, or bind, move, remount or a propagation")
        return MountCall(Action.PROPAGATE, target, propagation=wish.propagation)
    return _new(wish, type_, source, target, translate)


def _call(wish: _Wish, action: Action, target: bytes) -> MountCall:
    flags = MountFlag.LAZY_CLEANUP if wish.lazy_cleanup else MountFlag(0)
    return MountCall(
        action,
        target,
        flags=flags,
        attributes_set=wish.attributes_set,
        attributes_clear=wish.attributes_clear,
        propagation=wish.propagation,
    )


def _remount(wish: _Wish, target: bytes) -> MountCall:
    call = _call(wish, Action.REMOUNT, target)
    if wish.bind is not None:
        action, recursive = wish.bind
        if action != Action.BIND or wish.options:
            raise OptionError("remount with bind takes attributes of the mount only")
        return call._replace(flags=call.flags | MountFlag.BIND_ONLY | recursive)
    options = [_plain_option(word) for word in wish.options]
    if (wish.attributes_set | wish.attributes_clear) & _RDONLY:
        options.append(Option(OptionKind.FLAG, b"ro" if wish.attributes_set & _RDONLY else b"rw"))
    return call._replace(options=tuple(options))


def _bind(wish: _Wish, source: str, target: bytes, translate: Translate) -> MountCall:
    assert wish.bind is not None
    action, recursive = wish.bind
    if wish.options:
        raise OptionError(f"option '{wish.options[0]}' cannot be given with bind or move")
    below, path = translate(os.fsencode(source))
    call = _call(wish, action, target)
    flags = call.flags | recursive | (MountFlag.SOURCE_BELOW if below else MountFlag(0))
    # mount(8) adds rw to whatever is not ro; what is bound stays as read-only as it is.
    return call._replace(source=path, flags=flags, attributes_clear=call.attributes_clear & ~_RDONLY)


def _new(wish: _Wish, type_: str, source: str, target: bytes, translate: Translate) -> MountCall:
    options = [option for word in wish.options for option in _options(word, translate)]
    if wish.attributes_set & _RDONLY:
        options.append(Option(OptionKind.FLAG, b"ro"))
    below, spec = False, os.fsencode(source)
    if source.startswith("/") and type_ not in _NETWORK:
        below, spec = translate(spec)
    call = _call(wish, Action.NEW, target)
    flags = call.flags | (MountFlag.SOURCE_BELOW if below else MountFlag(0))
    return call._replace(
        source=spec, type=os.fsencode(type_), flags=flags, options=tuple(options), attributes_clear=0
    )


def _plain_option(word: str) -> Option:
    name, equals, value = word.partition("=")
    if not equals:
        return Option(OptionKind.FLAG, os.fsencode(name))
    return Option(OptionKind.TEXT, os.fsencode(name), os.fsencode(value))


def _options(word: str, translate: Translate) -> list[Option]:
    """One option of the command line; overlayfs' lower directories are one each."""
    name, equals, value = word.partition("=")
    if not equals or (name != "lowerdir" and name not in _PATHS):
        return [_plain_option(word)]
    paths = [os.fsencode(value)]
    if name == "lowerdir":
        paths = [re.sub(rb"\\(.)", rb"\1", layer) for layer in _LAYER.findall(paths[0])]
    return [_path_option(os.fsencode(name), path, translate) for path in paths]


def _path_option(name: bytes, path: bytes, translate: Translate) -> Option:
    below, translated = translate(path)
    return Option(OptionKind.PATH_BELOW if below else OptionKind.PATH, name, translated)
