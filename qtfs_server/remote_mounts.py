"""SYSMOUNT, SYSUMOUNT, LIST_MOUNTS: mounting on the server for a client.

Every place is found once, by openat2(2) from the session's root (or from / for sources elsewhere), and only its
descriptor is used from then on. Mounting goes through descriptors (fsopen(2), open_tree(2), move_mount(2)); unmounting,
which an own descriptor would prevent, names the last component below the directory's descriptor.
What a session mounted is remembered by mount id, to be unmounted when it ends if the client wants that.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from qtfs_common import mountinfo, remote_calls
from qtfs_common.mount_calls import (
    BENEATH,
    CMD_CREATE,
    CMD_RECONFIGURE,
    NO_MAGICLINKS,
    SET_FD,
    SET_FLAG,
    SET_STRING,
    change_mount,
    fsconfig,
    fsmount,
    fsopen,
    fspick,
    mount_id,
    mount_setattr,
    move_mount,
    open_tree,
    openat2,
    umount,
    unique_mount_id,
)
from qtfs_common.protocol import LIMITS
from qtfs_common.remote_calls import Action, MountCall, MountFlag, MountRecord, Option, OptionKind
from qtfs_server import loops, mount_rules
from qtfs_server.letting_go import mount_gone, release_mount
from qtfs_server.mount_records import Made, MountRecords
from qtfs_server.mount_rules import path_of
from qtfs_server.mounts import read_table, unique_ids

if TYPE_CHECKING:
    from qtfs_server.errands import Errand

log = logging.getLogger(__name__)

# mount(2), umount2(2), <linux/mount.h>
_MS_RDONLY = 1
_MS_REMOUNT = 32
_MS_BIND = 4096
_MS_REC = 1 << 14
_PROPAGATIONS = frozenset(1 << bit for bit in (17, 18, 19, 20))
_ATTR_RDONLY = 1
_ATTR_NODEV = 4
_ATTR_ATIME = 0x70
#: Attribute and its MS_ flag, for kernels without mount_setattr(2).
_ATTR_FLAGS = {1: 1, 2: 2, 4: 4, 8: 8, 0x10: 1 << 10, 0x20: 1 << 24, 0x80: 1 << 11, 0x200000: 1 << 8}
_ATTRIBUTES = _ATTR_ATIME | sum(_ATTR_FLAGS)
_MNT_DETACH = 2
_UMOUNT_FLAGS = 7
_UMOUNT_NOFOLLOW = 8

_MOST_TEXT = 4095

#: Whoever else unmounts what a session mounted does not tell us: once in so many mounts we look.
_PRUNED_AT = 256

#: A file that a client has just closed is still being closed when it asks for the unmount.
_UMOUNT_ATTEMPTS = 6
_UMOUNT_DELAY_S = 0.02


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _link(fd: int) -> bytes:
    """A path that stands for a descriptor's very mount and directory."""
    return b"/proc/self/fd/%d" % fd


# ------------------------------------------------------------------------------------------------------------ places


def _check_below(path: bytes) -> None:
    """EINVAL for what is no path below something, component by component."""
    if path and any(name in (b"", b".", b"..") for name in path.split(b"/")):
        raise _error(errno.EINVAL)


def _open_below(stack: ExitStack, root: int, path: bytes) -> int:
    """What a path below the session's root leads to. Symbolic links are followed as far as they stay below it."""
    _check_below(path)
    fd = openat2(root, path, os.O_PATH, BENEATH | NO_MAGICLINKS) if path else os.dup(root)
    stack.callback(os.close, fd)
    return int(fd)


def _open_anywhere(stack: ExitStack, path: bytes, target: bytes) -> int:
    """What an absolute path of the server leads to. EPERM, if the whitelist lacks it, comes before ENOENT."""
    if not path.startswith(b"/"):
        raise _error(errno.EINVAL)
    try:
        fd = openat2(0, path, os.O_PATH, NO_MAGICLINKS)
    except OSError:
        mount_rules.check_source(os.path.realpath(path), target)
        raise
    stack.callback(os.close, fd)
    return int(fd)


class _Site:
    """Where a mount is asked for, with what it needs open until it is done."""

    def __init__(self, stack: ExitStack, errand: Errand, call: MountCall) -> None:
        self.stack = stack
        self.call = call
        self.root = errand.root()
        stack.callback(os.close, self.root)
        self.target = _open_below(stack, self.root, call.target)
        self.path = path_of(self.target)
        mount_rules.check_place(self.path)

    def open_source(self, below: bool, path: bytes) -> tuple[int, bytes]:
        """A source that the whitelist allows here: its descriptor and real path."""
        fd = _open_below(self.stack, self.root, path) if below else _open_anywhere(self.stack, path, self.path)
        real = path_of(fd)
        mount_rules.check_source(real, self.path)
        return fd, real

    def keep(self, fd: int) -> int:
        self.stack.callback(os.close, fd)
        return fd


# ---------------------------------------------------------------------------------------------------------- mounting


def _check_call(call: MountCall) -> None:
    if (call.attributes_set | call.attributes_clear) & ~_ATTRIBUTES:
        raise _error(errno.EINVAL)
    if call.attributes_clear & _ATTR_NODEV:
        raise _error(errno.EPERM)
    if call.propagation and call.propagation & ~_MS_REC not in _PROPAGATIONS:
        raise _error(errno.EINVAL)
    if call.action in (Action.NEW, Action.BIND, Action.MOVE) and not call.target:
        raise _error(errno.EBUSY)  # it would hide the session's root from nobody but the session


def _source_of_new(site: _Site) -> bytes:
    """What the `source` of a new file system is: a checked path if it takes a device, else any text."""
    call = site.call
    below = bool(call.flags & MountFlag.SOURCE_BELOW)
    if not mount_rules.takes_device(call.type):
        if below:
            raise _error(errno.EINVAL)
        return call.source
    fd, real = site.open_source(below, call.source)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return loops.attach(site.stack, fd, real, any(option.name == b"ro" for option in call.options))
    # A device node elsewhere may be one that a client has made.
    if not stat.S_ISBLK(mode) or not real.startswith(b"/dev/"):
        raise _error(errno.ENOTBLK)
    return real


def _set_paths(site: _Site, context: int, name: bytes, fds: list[int]) -> None:
    """Set an option whose values are the paths of descriptors."""
    appends = name.removesuffix(b"+") + b"+" if name.startswith(b"lowerdir") else name
    try:
        for fd in fds:
            fsconfig(context, SET_FD, appends, None, fd)
    except OSError as error:
        # Before Linux 6.13 overlayfs takes no descriptors, nor do others ever.
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
        fsconfig(context, SET_STRING, name, b":".join(map(_link, fds)))


def _set_options(site: _Site, context: int, options: tuple[Option, ...]) -> None:
    paths: dict[bytes, list[int]] = {}
    for option in options:
        if option.kind == OptionKind.FLAG:
            fsconfig(context, SET_FLAG, option.name, None)
        elif option.kind == OptionKind.TEXT:
            fsconfig(context, SET_STRING, option.name, option.value)
        else:
            fd, _ = site.open_source(option.kind == OptionKind.PATH_BELOW, option.value)
            paths.setdefault(option.name, []).append(fd)
    for name, fds in paths.items():
        _set_paths(site, context, name, fds)


def _new(site: _Site) -> int:
    """A new file system, mounted; a descriptor of the mount."""
    call = site.call
    mount_rules.check_type(call.type, site.path)
    mount_rules.check_options(call.type, call.options)
    context = site.keep(fsopen(call.type))
    source = _source_of_new(site)
    if source:
        fsconfig(context, SET_STRING, b"source", source)
    _set_options(site, context, call.options)
    fsconfig(context, CMD_CREATE, None, None)
    # Only in devpts can nobody make device nodes.
    mounted = site.keep(fsmount(context, call.attributes_set | (0 if call.type == b"devpts" else _ATTR_NODEV)))
    move_mount(mounted, site.target)
    return mounted


def _bind(site: _Site) -> int:
    call = site.call
    source, real = site.open_source(bool(call.flags & MountFlag.SOURCE_BELOW), call.source)
    if not mount_rules.keeps_devices(real):
        call = call._replace(attributes_set=call.attributes_set | _ATTR_NODEV)
    recursive = bool(call.flags & MountFlag.RECURSIVE)
    mounted = site.keep(open_tree(source, recursive))
    try:
        # Before it can be seen: a device of it could be opened meanwhile.
        mount_setattr(mounted, recursive, call.attributes_set, call.attributes_clear)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        move_mount(mounted, site.target)  # Linux 5.11 and before
        _undo_on_failure(mounted, lambda: _set_attributes(mounted, call))
    else:
        move_mount(mounted, site.target)
    return mounted


def _move(site: _Site) -> int:
    source, real = site.open_source(bool(site.call.flags & MountFlag.SOURCE_BELOW), site.call.source)
    if not mount_rules.keeps_devices(real):
        whole = MountFlag.RECURSIVE
        _set_attributes(source, site.call._replace(flags=whole, attributes_set=_ATTR_NODEV, attributes_clear=0))
    move_mount(source, site.target)
    return source


def _remount(site: _Site) -> int:
    call = site.call
    if not call.flags & MountFlag.BIND_ONLY:
        mount_rules.check_sharers(mount_id(site.target))
        if any(option.kind not in (OptionKind.FLAG, OptionKind.TEXT) for option in call.options):
            raise _error(errno.EINVAL)
        mount_rules.check_options(b"", call.options)
        context = site.keep(fspick(site.target))
        _set_options(site, context, call.options)
        fsconfig(context, CMD_RECONFIGURE, None, None)
    if call.attributes_set or call.attributes_clear:
        _set_attributes(site.target, call)
    return site.target


def _set_attributes(mounted: int, call: MountCall) -> None:
    recursive = bool(call.flags & MountFlag.RECURSIVE)
    try:
        mount_setattr(mounted, recursive, call.attributes_set, call.attributes_clear)
    except OSError as error:
        if error.errno != errno.ENOSYS or recursive:
            raise
        change_mount(_link(mounted), _MS_REMOUNT | _MS_BIND | _flags_after(mounted, call))


def _flags_after(mounted: int, call: MountCall) -> int:
    """MS_ flags of a mount as they are to be: statvfs(3) tells them by the same bits but for RELATIME."""
    now = os.fstatvfs(mounted).f_flag
    bits = {attribute: flag for attribute, flag in _ATTR_FLAGS.items() if not attribute & _ATTR_ATIME}
    kept = sum(flag for attribute, flag in bits.items() if now & flag and not call.attributes_clear & attribute)
    wanted = sum(flag for attribute, flag in _ATTR_FLAGS.items() if call.attributes_set & attribute)
    return kept | wanted


def _undo_on_failure(mounted: int, step: Callable[[], None]) -> None:
    """Take a mount away again if the step after it fails."""
    try:
        step()
    except OSError:
        with contextlib.suppress(OSError):
            umount(_link(mounted), _MNT_DETACH)
        raise


_ACTIONS = {Action.NEW: _new, Action.BIND: _bind, Action.MOVE: _move, Action.REMOUNT: _remount}


def _perform(site: _Site) -> int:
    """Do what is asked for; a descriptor of the mount that it is about."""
    call = site.call
    if call.action == Action.PROPAGATE:
        change_mount(_link(site.target), call.propagation)
        return site.target
    mounted = _ACTIONS[call.action](site)
    if call.propagation:
        change_mount(_link(mounted), call.propagation)
    return mounted


# -------------------------------------------------------------------------------------------------------- unmounting


def _detach(directory: int, name: bytes, flags: int) -> int:
    """Unmount what is mounted on a name; the id of that mount."""
    path = _link(directory) + b"/" + name
    mounted = mount_id(directory, name)
    if mounted == mount_id(directory):
        raise _error(errno.EINVAL)
    for attempt in range(_UMOUNT_ATTEMPTS):
        release_mount(mounted)
        try:
            umount(path, flags | _UMOUNT_NOFOLLOW)
            break
        except OSError as error:
            if error.errno != errno.EBUSY or attempt == _UMOUNT_ATTEMPTS - 1:
                raise
        time.sleep(_UMOUNT_DELAY_S)
    if not flags & _MNT_DETACH:
        mount_gone(mounted)
    return int(mounted)


# ----------------------------------------------------------------------------------------------------------- sessions


class RemoteMounts:
    """Handlers of errands, and what sessions have mounted."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._made: dict[int, list[Made]] = {}
        self._records: MountRecords | None = None

    def mount(self, errand: Errand) -> bytes:
        """SYSMOUNT."""
        call = remote_calls.parse_mount(errand.body)
        _check_caller(errand)
        _check_call(call)
        with ExitStack() as stack:
            mounted = _perform(_Site(stack, errand, call))
            if call.action in (Action.NEW, Action.BIND):
                self._remember(errand, mounted, bool(call.flags & MountFlag.LAZY_CLEANUP))
        if not errand.session_lives:
            self.clean_up(errand.session)
        return b""

    def umount(self, errand: Errand) -> bytes:
        """SYSUMOUNT."""
        call = remote_calls.parse_umount(errand.body)
        _check_caller(errand)
        if call.flags & ~_UMOUNT_FLAGS:
            raise _error(errno.EINVAL)
        _check_below(call.target)
        if not call.target:
            raise _error(errno.EBUSY)
        parent, _, name = call.target.rpartition(b"/")
        with ExitStack() as stack:
            root = errand.root()
            stack.callback(os.close, root)
            directory = _open_below(stack, root, parent)
            mount_rules.check_place(path_of(directory).rstrip(b"/") + b"/" + name)
            self._forget(_detach(directory, name, call.flags))
        return b""

    def list_mounts(self, errand: Errand) -> bytes:
        """LIST_MOUNTS."""
        call = remote_calls.parse_list(errand.body)
        root = errand.root()
        try:
            path, root_mount = path_of(root), mount_id(root)
        finally:
            os.close(root)
        return _page(call, _records(root_mount, path))

    # ---- what sessions have mounted

    def of_session(self, session: int) -> list[int]:
        """Ids of the mounts that a session made and that were not unmounted through a session."""
        with self._guard:
            return [made.id for made in self._made.get(session, ())]

    def has_any(self, session: int) -> bool:
        """Whether a session has mounted anything."""
        with self._guard:
            return session in self._made

    def clean_up(self, session: int) -> None:
        """Forget what a session that has ended mounted; unmount what was to go with it, the newest first."""
        with self._guard:
            made = self._made.pop(session, [])
        for mount in reversed(made):
            if mount.lazy_cleanup:
                _detach_again(mount)
        with self._guard:
            self._save(session)

    def clean_up_all(self) -> None:
        """The same for all sessions, as the engine ends."""
        with self._guard:
            sessions = list(self._made)
        for session in sessions:
            self.clean_up(session)

    def belongings(self) -> dict[str, list[tuple[int, int, bool]]]:
        """What all sessions have mounted, for the next engine."""
        with self._guard:
            return {str(s): [(m.id, m.unique, m.lazy_cleanup) for m in made] for s, made in self._made.items()}

    def go_on(self, belongings: dict[str, list[tuple[int, int, bool]]]) -> None:
        """The opposite."""
        with self._guard:
            self._made = {int(session): [Made(*mount) for mount in made] for session, made in belongings.items()}

    def keep_in(self, records: MountRecords, ours: set[str]) -> list[int]:
        """Write down from now on what sessions mount, and go on with what is written down of `ours`, by name.

        Returns the sessions that have ended without their mounts.
        """
        with self._guard:
            self._records = records
            for session in self._made:
                self._save(session)
            left = records.load(ours)
            self._made = left | self._made
        return [session for session in left if f"{session:016x}" not in ours]

    def _save(self, session: int) -> None:
        if self._records is not None:
            self._records.save(session, self._made.get(session, ()))

    def _remember(self, errand: Errand, mounted: int, lazy_cleanup: bool) -> None:
        fresh = Made(mount_id(mounted), unique_mount_id(mounted), lazy_cleanup)
        with self._guard:
            made = self._made.setdefault(errand.session, [])
            made.append(fresh)
            if len(made) % _PRUNED_AT == 0:
                there = mountinfo.read()
                made[:] = [mount for mount in made if mount.id in there]
            self._save(errand.session)

    def _forget(self, mounted: int) -> None:
        with self._guard:
            for session, made in self._made.items():
                if any(mount.id == mounted for mount in made):
                    made[:] = [mount for mount in made if mount.id != mounted]
                    self._save(session)


def _check_caller(errand: Errand) -> None:
    """Mounting is for root, and changes something."""
    if errand.uid != 0:
        raise _error(errno.EPERM)
    if errand.read_only:
        raise _error(errno.EROFS)


def _detach_again(made: Made) -> None:
    """Unmount what a session made, wherever it is by now, unless it is gone."""
    mount = mountinfo.read().get(made.id)
    if mount is None:
        return
    parent, _, name = mount.path.rpartition(b"/")
    try:
        directory = os.open(parent or b"/", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            # Before Linux 6.8 a mount that somebody else made under this id since then would be taken for ours.
            if mount_id(directory, name) == made.id and unique_mount_id(directory, name) == made.unique:
                umount(_link(directory) + b"/" + name, _MNT_DETACH | _UMOUNT_NOFOLLOW)
        finally:
            os.close(directory)
    except OSError as error:
        log.warning("%s: cannot be unmounted after its session: %s", os.fsdecode(mount.path), error.strerror)


def _records(root_mount: int, root: bytes) -> list[bytes]:
    """The mounts below a directory, packed; their ids are never used again, from Linux 6.8 on."""
    table = read_table()
    ids = unique_ids(table)
    cut = len(root.rstrip(b"/")) + 1
    records = []
    for mount in mountinfo.visible_below(table.values(), root_mount, root):
        texts = (mount.path[cut:], mount.type, mount.source, mount.options, mount.super_options)
        short = (text[:_MOST_TEXT] for text in texts)
        numbers = (ids[mount.id], ids.get(mount.parent, 0), mount.major, mount.minor)
        records.append(remote_calls.pack_mount_record(MountRecord(*numbers, *short)))
    return records


def _page(call: remote_calls.ListCall, records: list[bytes]) -> bytes:
    """As many records as were asked for and fit. EAGAIN: the listing has changed since its first page."""
    if call.size > LIMITS["MAX_PAYLOAD"]:
        raise _error(errno.EINVAL)
    token = int.from_bytes(hashlib.blake2b(b"".join(records), digest_size=8).digest(), "little") | 1
    if call.token not in (0, token):
        raise _error(errno.EAGAIN)
    chosen: list[bytes] = []
    room = call.size - len(remote_calls.pack_page(0, 0, []))
    for packed in records[call.first :]:
        room -= len(packed)
        if room < 0:
            break
        chosen.append(packed)
    if room < 0 and not chosen:
        raise _error(errno.EINVAL)
    return remote_calls.pack_page(token, len(records), chosen)
