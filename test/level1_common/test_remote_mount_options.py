"""mount(8)'s options as calls to the server: `qtfs_client.remote_mount`, and where paths lie."""

from __future__ import annotations

import pytest

from qtfs_client.options import OptionError
from qtfs_client.places import QtfsMount, place_of, qtfs_mounts
from qtfs_client.remote_mount import mount_call, on_server
from qtfs_common.mountinfo import parse
from qtfs_common.remote_calls import Action, MountCall, MountFlag, Option, OptionKind

ATIME = 0x70
MS_REC = 1 << 14


def translate(path: bytes) -> tuple[bool, bytes]:
    """/mnt is the mount."""
    return (True, path[5:]) if path.startswith(b"/mnt/") else (False, path)


def call(type_: str, source: str, *words: str) -> MountCall:
    return mount_call(type_, source, b"d", words, translate)


def test_a_new_file_system() -> None:
    made = call("tmpfs", "none", "rw", "nosuid", "size=1m", "huge", "noatime", "user=me", "x-gvfs", "_netdev", "loop")
    options = (Option(OptionKind.TEXT, b"size", b"1m"), Option(OptionKind.FLAG, b"huge"))
    assert made == MountCall(Action.NEW, b"d", b"none", b"tmpfs", attributes_set=2 | 0x10, options=options)


@pytest.mark.parametrize(
    ("type_", "source", "below", "spec"),
    [
        ("ext4", "/mnt/image", True, b"image"),
        ("ext4", "/dev/sdb1", False, b"/dev/sdb1"),
        ("nfs4", "host:/mnt/x", False, b"host:/mnt/x"),
        ("cifs", "//host/mnt", False, b"//host/mnt"),
        ("proc", "proc", False, b"proc"),
    ],
)
def test_sources(type_: str, source: str, below: bool, spec: bytes) -> None:
    made = call(type_, source, "ro")
    assert (made.source, made.flags) == (spec, MountFlag.SOURCE_BELOW if below else MountFlag(0))
    assert made.attributes_set == 1 and made.options == (Option(OptionKind.FLAG, b"ro"),), "both are read-only"


def test_layers_are_translated_one_by_one() -> None:
    made = call("overlay", "x", r"lowerdir=/mnt/a\:b:/srv/c:/mnt/d,upperdir=no".partition(",")[0], "upperdir=/mnt/u")
    assert made.options == (
        Option(OptionKind.PATH_BELOW, b"lowerdir", b"a:b"),
        Option(OptionKind.PATH, b"lowerdir", b"/srv/c"),
        Option(OptionKind.PATH_BELOW, b"lowerdir", b"d"),
        Option(OptionKind.PATH_BELOW, b"upperdir", b"u"),
    )


@pytest.mark.parametrize(
    ("type_", "words", "action", "flags"),
    [
        ("bind", (), Action.BIND, MountFlag(0)),
        ("rbind", (), Action.BIND, MountFlag.RECURSIVE),
        ("", ("bind",), Action.BIND, MountFlag(0)),
        ("none", ("rbind",), Action.BIND, MountFlag.RECURSIVE),
        ("move", (), Action.MOVE, MountFlag(0)),
        ("bind", ("lazy_cleanup",), Action.BIND, MountFlag.LAZY_CLEANUP),
        ("bind", ("lazy_cleanup", "nolazy_cleanup"), Action.BIND, MountFlag(0)),
    ],
)
def test_binds_and_moves(type_: str, words: tuple[str, ...], action: Action, flags: MountFlag) -> None:
    made = call(type_, "/mnt/a", "rw", *words)
    assert made == MountCall(action, b"d", b"a", flags=flags | MountFlag.SOURCE_BELOW), "rw of mount(8) does nothing"


def test_remounts() -> None:
    made = call("tmpfs", "none", "remount", "ro", "size=2m")
    options = (Option(OptionKind.TEXT, b"size", b"2m"), Option(OptionKind.FLAG, b"ro"))
    assert made == MountCall(Action.REMOUNT, b"d", attributes_set=1, options=options)
    made = call("tmpfs", "none", "remount", "ro", "rw")
    assert made == MountCall(Action.REMOUNT, b"d", attributes_clear=1, options=(Option(OptionKind.FLAG, b"rw"),))
    made = call("bind", "none", "remount", "strictatime", "noexec", "exec")
    wanted, unwanted = 0x20, ATIME & ~0x20 | 8
    assert (made.attributes_set, made.attributes_clear & ~0x20) == (wanted, unwanted)
    assert (made.flags, made.options) == (MountFlag.BIND_ONLY, ())


@pytest.mark.parametrize(
    ("word", "bits"),
    [
        ("make-shared", 1 << 20),
        ("private", 1 << 18),
        ("make-rslave", 1 << 19 | MS_REC),
        ("runbindable", 1 << 17 | MS_REC),
    ],
)
def test_propagation(word: str, bits: int) -> None:
    assert call("none", "none", word) == MountCall(Action.PROPAGATE, b"d", propagation=bits)
    assert call("tmpfs", "none", word).propagation == bits


@pytest.mark.parametrize(
    ("type_", "words"),
    [("", ()), ("none", ("ro",)), ("bind", ("size=1m",)), ("bind", ("remount", "size=1m")), ("move", ("remount",))],
)
def test_what_makes_no_sense(type_: str, words: tuple[str, ...]) -> None:
    with pytest.raises(OptionError):
        call(type_, "/mnt/a", *words)


def test_without_a_mount_paths_are_the_servers() -> None:
    assert on_server(b"/srv/x") == (False, b"/srv/x")
    with pytest.raises(OptionError):
        on_server(b"x")


# ---- where paths lie

MOUNTINFO = b"""\
20 1 8:1 / / rw - ext4 /dev/sda1 rw
30 20 0:40 / /mnt rw shared:1 - fuse.qtfs /srv rw
31 30 0:41 / /mnt/inner rw - tmpfs none rw
32 20 0:40 /part/of /bound rw - fuse.qtfs /srv rw
33 20 0:42 / /with\\040blank rw - fuse.qtfs /a\\040b rw
34 20 0:43 / /covered rw - fuse.qtfs /srv rw
35 34 0:44 / /covered rw - tmpfs  rw
36 30 0:45 / /mnt/s rw - fuse.qtfs /srv/s rw
37 36 0:46 / /mnt/s/t rw - fuse.qtfs /srv/s/t rw
38 36 0:47 / /mnt/s/a rw - fuse.qtfs /srv/s/a rw
39 30 0:48 / /mnt/o rw - fuse.qtfs /srv/other rw
"""


def served(mount: QtfsMount) -> bool:
    return mount.device not in ("0:45", "0:46", "0:48")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (b"/mnt", ("0:40", b"")),
        (b"/mnt/a/b", ("0:40", b"a/b")),
        (b"/mnt2", None),
        (b"/mnt/inner/x", None),
        (b"/mnt/inner2", ("0:40", b"inner2")),
        (b"/bound/x", ("0:40", b"part/of/x")),
        (b"/bound", ("0:40", b"part/of")),
        (b"/with blank/x", ("0:42", b"x")),
        (b"/covered/x", None),
        (b"/mnt/s", ("0:40", b"s")),
        (b"/mnt/s/x", ("0:40", b"s/x")),
        (b"/mnt/s/t/x", ("0:40", b"s/t/x")),
        (b"/mnt/s/a/x", ("0:47", b"x")),
        (b"/mnt/o/x", ("0:48", b"x")),
        (b"/", None),
    ],
)
def test_places(path: bytes, found: tuple[str, bytes] | None) -> None:
    table = {mount.id: mount for mount in map(parse, MOUNTINFO.splitlines())}
    place = place_of(path, served, table)
    assert (place and (place.mount.device, place.below)) == found
    sources = [b"/srv", b"/srv", b"/a b", b"/srv", b"/srv/s/a", b"/srv/other"]
    assert [mount.source for mount in qtfs_mounts(served, table)] == sources
