"""Scenarios about names: what is made, moved, removed, listed. Each runs in an empty directory, tells what it saw."""

from __future__ import annotations

import ctypes
import os
import socket
import stat
from typing import Any

from kit import as_user, brief, getdents, listing, many, outcome, renameat2

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4


def touch(name: str, text: str = "") -> None:
    with open(name, "w") as file:
        file.write(text)


def read(name: str) -> str:
    with open(name) as file:
        return file.read()


# ---- making


def mkdir_and_rmdir() -> Any:
    touch("file")
    return [
        outcome(os.mkdir, "d", 0o751),
        brief("d"),
        outcome(os.mkdir, "d"),
        outcome(os.mkdir, "file"),
        outcome(os.mkdir, "missing/d"),
        outcome(os.mkdir, "file/d"),
        outcome(os.mkdir, "d/below"),
        brief("d"),
        outcome(os.rmdir, "d"),
        outcome(os.rmdir, "file"),
        outcome(os.rmdir, "missing"),
        outcome(os.rmdir, "d/."),
        outcome(os.rmdir, "d/.."),
        outcome(os.rmdir, "d/below/"),
        outcome(os.rmdir, "d"),
        sorted(os.listdir()),
    ]


def mkdir_sets_mode_bits() -> Any:
    found = []
    for umask in (0, 0o022, 0o077):
        os.umask(umask)
        for mode in (0o777, 0o1777, 0o2777, 0o4777, 0):
            name = f"{umask:o}-{mode:o}"
            os.mkdir(name, mode)
            found.append((name, brief(name)))
    return found


def mknod_of_every_type() -> Any:
    found = []
    kinds = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR, stat.S_IFLNK, 0)
    for kind in kinds:
        for device in (0, os.makedev(1, 3), os.makedev(259, 1048575)):
            name = f"{kind:o}-{device}"
            found.append((name, outcome(os.mknod, name, kind | 0o640, device), outcome(brief, name)))
    return found


def mknod_as_a_user() -> Any:
    os.chmod(".", 0o777)

    def run() -> Any:
        kinds = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
        return [
            (outcome(os.mknod, oct(kind), kind | 0o666, os.makedev(1, 3)), outcome(brief, oct(kind))) for kind in kinds
        ]

    return as_user(run)


def symlinks() -> Any:
    targets = ["t", "../x", "/absolute/path", "x" * 4094, "x" * 4095, "x" * 4096, "", "a//b/./c", "ü\n\t"]
    found = []
    for index, target in enumerate(targets):
        made = outcome(os.symlink, target, str(index))
        found.append((made, outcome(os.readlink, str(index)), outcome(brief, str(index))))
    touch("file")
    return [*found, outcome(os.readlink, "file"), outcome(os.symlink, "t", "file"), outcome(os.readlink, "missing")]


def symlinks_are_followed() -> Any:
    os.mkdir("d")
    touch("d/file", "text")
    os.symlink("d", "to-d")
    os.symlink("to-d/file", "to-file")
    os.symlink("loop", "loop")
    os.symlink("nowhere", "dangling")
    for number in range(45):
        os.symlink(str(number + 1) if number < 44 else "d", str(number))
    return [
        read("to-file"),
        read("to-d/../to-d/file"),
        outcome(read, "loop"),
        outcome(read, "dangling"),
        outcome(os.listdir, "5"),
        outcome(os.listdir, "4"),
        outcome(os.listdir, "0"),
        outcome(touch, "dangling", "made"),
        outcome(read, "nowhere"),
        outcome(os.unlink, "to-d/"),
        outcome(os.rmdir, "to-d"),
        os.path.islink("to-d"),
    ]


def hard_links() -> Any:
    touch("a", "text")
    os.mkdir("d")
    os.symlink("a", "link")
    os.mkfifo("fifo")
    found = [
        outcome(os.link, "a", "d/b"),
        outcome(os.link, "a", "d/b"),
        outcome(os.link, "missing", "c"),
        outcome(os.link, "d", "c"),
        outcome(os.link, "a", "missing/c"),
        outcome(os.link, "a", "a/c"),
        outcome(os.link, "link", "second-link", follow_symlinks=False),
        outcome(os.link, "fifo", "second-fifo"),
        os.path.samefile("a", "d/b"),
        brief("a"),
    ]
    touch("d/b", "changed")
    os.unlink("a")
    return [*found, read("d/b"), brief("d/b"), brief("second-link"), brief("second-fifo")]


def many_hard_links() -> Any:
    touch("0")
    for number in range(1, many(300)):
        os.link("0", str(number))
    for number in range(0, many(300), 2):
        os.unlink(str(number))
    return brief("1"), len({os.stat(name).st_ino for name in os.listdir()})


def names_are_bytes() -> Any:
    names = [
        b"x" * 255,
        bytes(range(1, 47)),
        bytes(range(48, 256)),
        b"\xff\xfe",
        "日本語".encode(),
        b"...",
        b" ",
        b"-rf",
    ]
    bad = [b"x" * 256, b"\xc3" * 300]
    made = [outcome(os.mkdir, name) for name in names + bad]
    return (
        made,
        sorted(os.listdir(b".")),
        [outcome(os.stat, name) for name in bad],
        [outcome(os.rmdir, n) for n in names],
    )


def paths_up_to_path_max() -> Any:
    """4095 bytes are a path, 4096 are none."""
    part = "d" * 250
    path = part
    os.mkdir(path)
    while len(path) + 251 <= 4000:
        path += "/" + part
        os.mkdir(path)
    room = 4095 - len(path) - 1
    longest, longer = f"{path}/{'f' * min(room, 255)}", f"{path}/{'f' * 200}/{'g' * 200}"
    while len(longest) < 4094:
        longest = "./" + longest
    if len(longest) == 4094:
        longest = "./" + longest[1:]
    return [
        len(longest),
        outcome(touch, longest, "deep"),
        outcome(read, longest),
        outcome(touch, "./" + longest),
        outcome(touch, longer),
        outcome(brief, "./" * 2048),
        outcome(brief, "./" * 2047 + "."),
    ]


# ---- removing


def unlink_everything() -> Any:
    touch("file")
    os.mkdir("d")
    touch("d/x")
    os.symlink("d", "link")
    os.mkfifo("fifo")
    return [
        outcome(os.unlink, "d"),
        outcome(os.rmdir, "d"),
        outcome(os.unlink, "file/x"),
        outcome(os.unlink, "missing"),
        outcome(os.unlink, "link"),
        outcome(os.unlink, "fifo"),
        outcome(os.unlink, "file/"),
        outcome(os.unlink, "file"),
        outcome(os.unlink, "."),
        outcome(os.rmdir, "."),
        sorted(os.listdir()),
    ]


def a_removed_working_directory() -> Any:
    os.mkdir("d")
    os.chdir("d")
    os.rmdir("../d")
    return [
        outcome(os.getcwd),
        outcome(os.mkdir, "x"),
        outcome(touch, "x"),
        outcome(os.listdir),
        outcome(os.stat, ".") and os.stat(".").st_nlink,
    ]


# ---- moving


def rename_between_all_types() -> Any:
    """Every kind of thing onto every kind of thing."""
    kinds = ("file", "empty", "full", "link", "missing")
    found = {}
    for old in kinds:
        for new in kinds:
            directory = f"{old}-{new}"
            os.mkdir(directory)
            os.chdir(directory)
            for prefix, kind in (("a", old), ("b", new)):
                if kind == "file":
                    touch(prefix, prefix)
                elif kind == "link":
                    os.symlink(prefix + "-target", prefix)
                elif kind != "missing":
                    os.mkdir(prefix)
                    if kind == "full":
                        touch(prefix + "/x")
            found[directory] = (outcome(os.rename, "a", "b"), sorted(os.listdir()), outcome(brief, "b"))
            os.chdir("..")
    return found


def rename_at_the_edges() -> Any:
    os.makedirs("d/e/f")
    touch("file", "1")
    os.link("file", "same")
    return [
        outcome(os.rename, "d", "d"),
        outcome(os.rename, "d", "d/e/g"),
        outcome(os.rename, "d/e", "d"),
        outcome(os.rename, "d/.", "x"),
        outcome(os.rename, "d/..", "x"),
        outcome(os.rename, "file", "missing/x"),
        outcome(os.rename, "file", "file/x"),
        outcome(os.rename, "file/", "x"),
        outcome(os.rename, "file", "x/"),
        outcome(os.rename, "d/", "moved/"),
        outcome(os.rename, "file", "same"),
        sorted(os.listdir()),
        outcome(os.rename, "file", "x" * 256),
        outcome(os.rename, "moved/e/f", "f"),
        brief("moved/e"),
        outcome(os.rename, "", "x"),
    ]


def rename_flags() -> Any:
    for name in ("a", "b"):
        touch(name, name)
    os.mkdir("d")
    touch("d/x")
    return [
        outcome(renameat2, "a", "b", NOREPLACE),
        outcome(renameat2, "a", "c", NOREPLACE),
        outcome(renameat2, "b", "c", EXCHANGE),
        (read("b"), read("c")),
        outcome(renameat2, "b", "d", EXCHANGE),
        read("d"),
        outcome(renameat2, "b", "missing", EXCHANGE),
        outcome(renameat2, "missing", "b", EXCHANGE),
        outcome(renameat2, "b", "b/below", EXCHANGE),
        outcome(renameat2, "c", "e", NOREPLACE | EXCHANGE),
        outcome(renameat2, "c", "e", 64),
        outcome(renameat2, "c", "white", WHITEOUT),
        brief("c"),
        sorted(os.listdir()),
    ]


def rename_replaces_what_is_open() -> Any:
    touch("old", "old")
    touch("new", "new")
    fd = os.open("old", os.O_RDWR)
    os.rename("new", "old")
    return read("old"), os.pread(fd, 10, 0), os.write(fd, b"still"), os.fstat(fd).st_nlink, os.fstat(fd).st_size


# ---- listing


def listing_at_any_buffer_size() -> Any:
    names = [f"{number:03}" + "x" * (number * 7 % 250) for number in range(many(200))]
    for name in names:
        touch(name)
    expected = sorted(name.encode() for name in [*names, ".", ".."])
    sizes = (280, 300, 512, 1024, 4096, 32768, 1 << 20)
    return [sorted(name for *_, name in listing(".", size)) == expected for size in sizes], outcome(listing, ".", 24)


def listing_tells_types_and_inodes() -> Any:
    touch("file")
    os.mkdir("d")
    os.symlink("x", "link")
    os.mkfifo("fifo")
    os.mknod("null", stat.S_IFCHR, os.makedev(1, 3))
    found = sorted((name, kind, ino == os.lstat(name).st_ino) for ino, _, kind, name in listing(".") if name != b"..")
    with os.scandir() as entries:
        seen = sorted((e.name, e.is_file(), e.is_dir(follow_symlinks=False), e.is_symlink()) for e in entries)
    return found, seen


def seekdir_returns_to_any_place() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    for number in range(many(300)):
        touch(f"{number:04}")
    stream = ctypes.c_void_p(libc.opendir(b"."))

    def next_name() -> bytes | None:
        entry = libc.readdir(stream)
        return ctypes.string_at(entry + 19) if entry else None

    places, names = [], []
    while True:
        place, name = libc.telldir(stream), next_name()
        if name is None:
            break
        places.append(place)
        names.append(name)
    good = []
    for at in map(many, (250, 0, 1, 150, 299, 17)):
        libc.seekdir(stream, ctypes.c_long(places[at]))
        good.append(next_name() == names[at] and next_name() == names[at + 1])
    libc.rewinddir(stream)
    good.append(next_name() == names[0])
    libc.closedir(stream)
    return len(names), good


def listing_while_names_come_and_go() -> Any:
    """What is there all the time is seen exactly once."""
    for number in range(many(400)):
        touch(f"stay-{number}")
        touch(f"go-{number}")
    seen = []
    fd = os.open(".", os.O_RDONLY)
    for round_ in range(10000):
        block = list(getdents(fd, 1024))
        if not block:
            break
        seen += [name for *_, name in block]
        if round_ < many(40):
            for number in range(round_ * 10, round_ * 10 + 10):
                os.unlink(f"go-{number}")
                touch(f"new-{number}")
    for name in os.listdir():
        if not name.startswith("stay-"):
            os.unlink(name)  # how far it came depends on how much fits into a block
    stayed = [name for name in seen if name.startswith(b"stay-")]
    return len(stayed), len(set(stayed))


def removing_while_listing() -> Any:
    os.mkdir("d")
    for number in range(many(1000)):
        touch(f"d/{number}")
    with os.scandir("d") as entries:
        for entry in entries:
            os.unlink(entry.path)
    return os.listdir("d"), outcome(os.rmdir, "d")


# ---- special files


def sockets_keep_their_type_and_connect() -> Any:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("s")
    listening.listen()
    client = socket.socket(socket.AF_UNIX)
    connected = outcome(client.connect, "s")
    accepted, _ = listening.accept()
    client.sendall(b"hello")
    return brief("s"), connected, accepted.recv(10), outcome(listening.bind, "s"), outcome(open, "s")


def fifos_keep_their_type() -> Any:
    os.mkfifo("f", 0o640)
    return (
        brief("f"),
        outcome(os.mkfifo, "f"),
        outcome(os.open, "f", os.O_WRONLY | os.O_NONBLOCK),
        stat.S_ISFIFO(os.stat("f").st_mode),
    )


_HELPERS = (touch, read)
#: All of this module, in its order.
SCENARIOS = [x for x in list(globals().values()) if getattr(x, "__module__", "") == __name__ and x not in _HELPERS]
