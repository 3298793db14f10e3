"""One actor: a process that makes calls on a mount by seed, and compares what comes of each with a model.

    actor.py NAME THERE HERE PROGRESS

THERE is the directory by way of the mount, HERE the same on the server. PROGRESS is a file of eight bytes, where it
keeps the number of calls that it has made.

It obeys lines of JSON (`actors.py` writes them) and answers each with one:

    {"do": "prepare", "seed": 5, "place": "s5", "mortal": false, "orphans": true}
    {"do": "act", "calls": 50}
    {"do": "judge"}

`mortal`: the mount's daemon may be killed, so a call that ends with ENOTCONN may or may not have had its effect; the
actor then says {"down": ...}, and goes on, with what there is, after another line. `orphans`: files may lose their last
name while they are open. An answer with "wrong" says what was not as it must be; the actor is of no use after that.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import functools
import json
import mmap
import os
import random
import stat
import struct
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from model import File, Model, fail, picture, resize, write_at

NAMES = "abcdefg"
DOWN = ("ENOTCONN", "ECONNABORTED")
_HELD_MOST = 4
#: What is told of a failure: the calls before it.
_SHOWN_CALLS = 20
_LARGE = 100_000


class Wrong(Exception):
    """Something is not as it must be."""


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


@dataclass
class Held:
    """An open file."""

    fd: int
    file: File
    appends: bool


class Actor:
    def __init__(self, name: str, there: str, here: str, progress: str) -> None:
        self.name, self.there, self.here = name, there, here
        self.made = 0
        with open(progress, "r+b") as file:
            self.progress = mmap.mmap(file.fileno(), 8)

    # ---- a seed

    def prepare(self, seed: int, place: str, mortal: bool, orphans: bool) -> None:
        """An empty directory, and what all share: log, counter, names to race for, locks that are held throughout."""
        self.draw = random.Random(f"{seed} {self.name}")
        self.model = Model()
        self.mortal, self.orphans = mortal, orphans
        self.shared, self.here_shared = f"{self.there}/{place}", f"{self.here}/{place}"
        self.top, self.here_top = f"{self.shared}/{self.name}", f"{self.here_shared}/{self.name}"
        self.held: list[Held] = []
        self.scan: Iterator[os.DirEntry[str]] | None = None
        self.scanned: list[str] = []
        self.calls: Counter[str] = Counter()
        self.last: deque[str] = deque(maxlen=_SHOWN_CALLS)
        self.lines: list[int] = []
        self.counted, self.won, self.raced = 0, list[int](), 0
        #: What may or may not have happened when the daemon was killed.
        self.unsure: dict[str, list[int]] = {"lines": [], "counted": [], "won": []}
        os.mkdir(self.top)
        self.log = os.open(f"{self.shared}/log", os.O_WRONLY | os.O_APPEND)
        self.lock = os.open(f"{self.shared}/lock-{self.name}", os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        fcntl.lockf(self.lock, fcntl.LOCK_EX, 10, 10)

    def act(self, calls: int) -> dict[str, Any]:
        kinds = [kind for kind, weight in KINDS.items() for _ in range(weight)]
        for _ in range(calls):
            kind = self.draw.choice(kinds)
            self.calls[kind.__name__] += 1
            kind(self)
        return {"calls": self.calls.total()}

    def judge(self) -> dict[str, Any]:
        """Close everything; the server must have what the model has."""
        while self.held:
            self._close(self.held[-1])
        while self.scan is not None:
            self.read_on()
        while max(self.log, self.lock) >= 0:  # who comes back from the daemon's death has another log
            name = "log" if self.log >= 0 else "lock"
            if self._check("close", lambda: None, functools.partial(os.close, getattr(self, name))):
                setattr(self, name, -1)
        self._compare(self.model)
        sure = {"lines": self.lines, "counted": self.counted, "won": self.won}
        return {"sure": sure, "unsure": self.unsure, "kinds": self.calls}

    def _compare(self, model: Model) -> None:
        expected, found = model.picture(), picture(self.here_top)
        if found != expected:
            names = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
            shown = [f"{n}: {_short(found.get(n))} instead of {_short(expected.get(n))}" for n in sorted(names)]
            raise Wrong("the server has " + "; ".join(shown))

    # ---- one call

    def _check(
        self, what: str, model: Callable[[], Any], real: Callable[[], Any], begin: Callable[[], None] | None = None
    ) -> bool:
        """Make a call; False if the daemon died meanwhile.

        `begin`: what the first of several requests does to the model, where the kernel makes several of one call.
        """
        possible = [copy.deepcopy(self.model)] if self.mortal else []
        if self.mortal and begin:
            begin()
            possible.append(copy.deepcopy(self.model))
        expected = outcome(model)
        got = outcome(real)
        self.made += 1
        struct.pack_into("<Q", self.progress, 0, self.made)
        if got == expected:
            self.last.append(f"{what}: {_short(got)}")
            return True
        if not self.mortal or not self._is_cut_short(got, begin is not None):
            raise Wrong(f"{what}: {_short(got)} instead of {_short(expected)}, after {'; '.join(self.last)}")
        self._come_back(possible[-1:] if isinstance(got, int) else possible, what)
        return False

    def _is_cut_short(self, got: Any, several: bool) -> bool:
        """By the daemon's death. EIO comes from a kernel that was copying a request or a reply when it was killed, a
        part of the data from one that lost it between two requests: then it is dead."""
        if got in DOWN:
            return True
        return (got == "EIO" or (several and isinstance(got, int))) and outcome(lambda: os.statvfs(self.there)) in DOWN

    def _come_back(self, possible: list[Model], what: str) -> None:
        """The daemon was killed in a call: wait for another mount, and see what came of it: all, or one of these."""
        for fd in (*(held.fd for held in self.held), self.log, self.lock):
            outcome(functools.partial(os.close, fd))
        self.held, self.scan, self.scanned = [], None, []
        self.lock = self.log = -1
        opened: Any = DOWN[0]
        while opened in DOWN:
            say({"down": what})
            hear()
            opened = outcome(lambda: os.open(f"{self.shared}/log", os.O_WRONLY | os.O_APPEND))
        if not isinstance(opened, int):
            raise Wrong(f"open after the daemon's death: {opened}")
        self.log = opened
        found = picture(self.here_top)
        self.model = next((model for model in possible if model.picture() == found), self.model)
        self._compare(self.model)

    def _path(self) -> str:
        """A path that may exist: usually in a directory that does."""
        way = [path for path, node in self.model.paths() if not isinstance(node, File) and path.count("/") < 2]
        parent = self.draw.choice(["", *way])
        name = self.draw.choice(NAMES)
        return f"{parent}/{name}" if parent else name

    def _existing(self) -> str:
        """A path that exists, if there is any."""
        paths = [path for path, _ in self.model.paths()]
        return self.draw.choice(paths) if paths and self.draw.random() < 0.9 else self._path()

    def _writable(self) -> str:
        paths = [path for path, node in self.model.paths() if isinstance(node, File)]
        return self.draw.choice(paths) if paths and self.draw.random() < 0.9 else self._path()

    def _real(self, path: str) -> str:
        return f"{self.top}/{path}"

    def _data(self) -> bytes:
        size = self.draw.randrange(1, 300) if self.draw.random() < 0.95 else self.draw.randrange(1, _LARGE)
        return self.draw.randbytes(size)

    def _let_go(self, path: str) -> None:
        """Close a file that is about to lose its last name, unless that is wanted."""
        node = outcome(lambda: self.model.find(path))
        if not self.orphans and isinstance(node, File) and node.links == 1:
            # Looked for anew each time: if the daemon dies meanwhile, all of them are gone.
            while held := next((held for held in self.held if held.file is node), None):
                self._close(held)

    # ---- names

    def mkdir(self) -> None:
        path = self._path()
        self._check(f"mkdir {path}", lambda: self.model.mkdir(path), lambda: os.mkdir(self._real(path)))

    def rmdir(self) -> None:
        path = self._existing()
        self._check(f"rmdir {path}", lambda: self.model.rmdir(path), lambda: os.rmdir(self._real(path)))

    def create(self) -> None:
        path = self._path()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._check(
            f"create {path}", lambda: self.model.create(path), lambda: os.close(os.open(self._real(path), flags, 0o644))
        )

    def unlink(self) -> None:
        path = self._existing()
        self._let_go(path)
        self._check(f"unlink {path}", lambda: self.model.unlink(path), lambda: os.unlink(self._real(path)))

    def rename(self) -> None:
        old, new = self._existing(), self._path()
        self._let_go(new)
        self._check(
            f"rename {old} {new}",
            lambda: self.model.rename(old, new),
            lambda: os.rename(self._real(old), self._real(new)),
        )

    def link(self) -> None:
        old, new = self._existing(), self._path()
        self._check(
            f"link {old} {new}", lambda: self.model.link(old, new), lambda: os.link(self._real(old), self._real(new))
        )

    def symlink(self) -> None:
        path, target = self._path(), f"nowhere/{self.draw.randrange(1000)}"
        self._check(
            f"symlink {path}", lambda: self.model.symlink(target, path), lambda: os.symlink(target, self._real(path))
        )

    def setxattr(self) -> None:
        path, name, value = self._writable(), f"user.{self.draw.randrange(3)}", self.draw.randbytes(20)
        flags = self.draw.choice((0, os.XATTR_CREATE, os.XATTR_REPLACE))
        self._check(
            f"setxattr {path} {name} {flags}",
            lambda: self.model.setxattr(path, name, value, flags),
            lambda: os.setxattr(self._real(path), name, value, flags),
        )

    def removexattr(self) -> None:
        path, name = self._writable(), f"user.{self.draw.randrange(3)}"
        self._check(
            f"removexattr {path} {name}",
            lambda: self.model.removexattr(path, name),
            lambda: os.removexattr(self._real(path), name),
        )

    # ---- looking

    def look(self) -> None:
        path = self._existing()

        def real() -> tuple[object, ...]:
            status = os.lstat(self._real(path))
            if stat.S_ISDIR(status.st_mode):
                return ("directory",)
            if stat.S_ISLNK(status.st_mode):
                return ("symlink", os.readlink(self._real(path)), status.st_nlink)
            return ("file", status.st_size, status.st_nlink)

        links = outcome(lambda: os.lstat(f"{self.here_top}/{path}").st_nlink)
        self._check(f"lstat {path} ({links} names on the server)", lambda: self.model.look(path), real)

    def listing(self) -> None:
        path = self._existing()
        self._check(
            f"listdir {path}", lambda: self.model.listing(path), lambda: sorted(os.listdir(self._real(path)))
        )

    def read_on(self) -> None:
        """Some more of a large directory that does not change: it stays open for several calls."""
        wanted = self.draw.randrange(1, 400)
        got: list[os.DirEntry[str]] = []

        def real() -> None:
            self.scan = self.scan or os.scandir(f"{self.there}/many")
            for entry in self.scan:
                got.append(entry)
                if len(got) == wanted:
                    break

        if not self._check("readdir", lambda: None, real):
            return
        self.scanned += [entry.name for entry in got]
        if len(got) < wanted:
            scanned, self.scanned, self.scan = sorted(self.scanned), [], None
            expected = sorted(os.listdir(f"{self.here}/many"))
            if scanned != expected:
                twice = [name for name, count in Counter(scanned).items() if count > 1]
                raise Wrong(f"readdir: {len(scanned)} of {len(expected)} names, twice: {twice[:3]}")

    # ---- contents

    def open(self) -> None:
        """Keep a file open."""
        path, appends = self._writable(), self.draw.random() < 0.5
        flags = os.O_WRONLY | os.O_APPEND if appends else os.O_RDWR
        fds: list[int] = []
        if len(self.held) == _HELD_MOST:
            self._close(self.draw.choice(self.held))

        def model() -> None:
            self.model.file(path)

        def real() -> None:
            fds.append(os.open(self._real(path), flags))

        if self._check(f"open {path}", model, real) and fds:
            self.held.append(Held(fds[0], self.model.file(path), appends))

    def _close(self, held: Held) -> None:
        self.held.remove(held)
        self._check("close", lambda: None, lambda: os.close(held.fd))

    def close(self) -> None:
        if self.held:
            self._close(self.draw.choice(self.held))

    def write(self) -> None:
        """To an open file."""
        if not self.held:
            return self.open()
        held, data, at = self.draw.choice(self.held), self._data(), self.draw.randrange(5000)
        # By its place in the model, which may have been copied meanwhile.
        place = len(held.file.data) if held.appends else at

        def model() -> int:
            write_at(held.file, data, place)
            return len(data)

        def real() -> int:
            return os.write(held.fd, data) if held.appends else os.pwrite(held.fd, data, at)

        def begin() -> None:
            """A page that the kernel has not read goes out alone (fuse_fill_write_pages in fs/fuse/file.c)."""
            write_at(held.file, data[: mmap.PAGESIZE - at % mmap.PAGESIZE], at)

        self._check(f"write {len(data)} bytes at {place}", model, real, None if held.appends else begin)

    def read(self) -> None:
        """A whole file: one that is open, or by its name."""
        readable = [held for held in self.held if not held.appends]
        if readable and self.draw.random() < 0.5:
            held = self.draw.choice(readable)
            self._check("pread", lambda: bytes(held.file.data), lambda: _whole(held.fd))
            return
        path = self._writable()

        def real() -> bytes:
            fd = os.open(self._real(path), os.O_RDONLY)
            try:
                if stat.S_ISDIR(os.fstat(fd).st_mode):
                    fail(errno.EISDIR)
                return _whole(fd)
            finally:
                os.close(fd)

        self._check(f"read {path}", lambda: self.model.read(path), real)

    def truncate(self) -> None:
        path, size = self._writable(), self.draw.randrange(6000)
        self._check(
            f"truncate {path} {size}",
            lambda: self.model.truncate(path, size),
            lambda: os.truncate(self._real(path), size),
        )

    def ftruncate(self) -> None:
        if not self.held:
            return self.open()
        held, size = self.draw.choice(self.held), self.draw.randrange(6000)
        self._check(f"ftruncate {size}", lambda: resize(held.file, size), lambda: os.ftruncate(held.fd, size))

    def fsync(self) -> None:
        if self.held:
            held = self.draw.choice(self.held)
            self._check("fsync", lambda: None, lambda: os.fsync(held.fd))

    # ---- what all share

    def append(self) -> None:
        """A numbered line to the log of all actors."""
        number = len(self.lines) + len(self.unsure["lines"])
        line = f"{self.name} {number} {'x' * self.draw.randrange(200)}\n".encode()
        if self._check(f"append line {number}", lambda: len(line), lambda: os.write(self.log, line)):
            self.lines.append(number)
        else:
            self.unsure["lines"].append(number)

    def count(self) -> None:
        """Add 1 to a number in a file, under a lock; without the lock, additions would be lost."""
        lock = self.draw.choice((fcntl.flock, fcntl.lockf))
        file = f"{self.shared}/{lock.__name__}"
        fds: list[int] = []
        if not self._check("open", lambda: None, lambda: fds.append(os.open(file, os.O_RDWR))):
            return
        (fd,) = fds
        try:
            if self._check(lock.__name__, lambda: None, lambda: lock(fd, fcntl.LOCK_EX)):
                self._add(fd, lock)
        finally:
            closed = outcome(lambda: os.close(fd))
        if closed and not self.mortal:
            raise Wrong(f"close: {closed}")

    def _add(self, fd: int, lock: Callable[[int, int], None]) -> None:
        numbers: list[int] = []
        if not self._check("read", lambda: None, lambda: numbers.append(int(os.pread(fd, 20, 0) or b"0"))):
            return
        text = b"%020d" % (numbers[0] + 1)
        if not self._check("write", lambda: len(text), lambda: os.pwrite(fd, text, 0)):
            self.unsure["counted"].append(1)
            return
        self.counted += 1
        if self.draw.random() < 0.7:  # or by closing the file
            self._check("unlock", lambda: None, lambda: lock(fd, fcntl.LOCK_UN))

    def race(self) -> None:
        """Try to be the one who creates the next name."""
        path = f"{self.shared}/race-{self.raced}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        results: list[str | None] = []
        if self._check("race", lambda: None, lambda: results.append(_create(path, flags))):
            if results == [None]:
                self.won.append(self.raced)
        else:
            self.unsure["won"].append(self.raced)
        self.raced += 1

    def probe(self) -> None:
        """Another actor's lock is held, all the time."""
        if self.mortal:
            return
        others = [name for name in os.listdir(self.here_shared) if name.startswith("lock-")]
        other = self.draw.choice(others)
        fd = os.open(f"{self.shared}/{other}", os.O_RDWR) if other != f"lock-{self.name}" else -1
        if fd < 0:
            return
        how, posix = fcntl.LOCK_EX | fcntl.LOCK_NB, self.draw.random() < 0.5

        def real() -> None:
            if posix:
                fcntl.lockf(fd, how, 5, 12)
            else:
                fcntl.flock(fd, how)

        try:
            self._check("lock of another", lambda: fail(errno.EAGAIN), real)
        finally:
            os.close(fd)


def _create(path: str, flags: int) -> str | None:
    """EEXIST, or None."""
    try:
        os.close(os.open(path, flags, 0o644))
    except FileExistsError:
        return "EEXIST"
    return None


def _whole(fd: int) -> bytes:
    """A file's contents, however many calls it takes."""
    data = b""
    while piece := os.pread(fd, 1 << 20, len(data)):
        data += piece
    return data


#: How often each is drawn.
KINDS: dict[Callable[[Actor], None], int] = {
    Actor.mkdir: 6, Actor.rmdir: 4, Actor.create: 8, Actor.unlink: 5, Actor.rename: 7, Actor.link: 4, Actor.symlink: 2,
    Actor.setxattr: 4, Actor.removexattr: 3, Actor.look: 3, Actor.listing: 2, Actor.read_on: 3, Actor.open: 5,
    Actor.close: 2, Actor.write: 10, Actor.read: 5, Actor.truncate: 2, Actor.ftruncate: 2, Actor.fsync: 1,
    Actor.append: 8, Actor.count: 4, Actor.race: 3, Actor.probe: 3,
}  # fmt: skip


def _short(what: object) -> str:
    text = repr(what)
    return text if len(text) < 200 else f"{text[:200]}... ({len(text)})"


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def hear() -> dict[str, Any]:
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    return dict(json.loads(line))


def main() -> None:
    actor = Actor(*sys.argv[1:])
    say({"ready": True})
    while True:
        order = hear()
        orders: dict[str, Callable[..., Any]] = {"prepare": actor.prepare, "act": actor.act, "judge": actor.judge}
        work = orders[order.pop("do")]
        try:
            say(work(**order) or {})
        except (Wrong, OSError) as wrong:
            say({"wrong": f"{actor.name}: {wrong}"})


if __name__ == "__main__":
    main()
