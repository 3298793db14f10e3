"""A file system in memory that says what each call must return: errno and effect as in Linux' own.

    model = Model()
    model.mkdir("a")            # done
    model.mkdir("a")            # OSError EEXIST

Paths are relative to the directory that belongs to one actor, and never climb. Nothing of ours is imported, so that an
actor starts at once.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import NoReturn


@dataclass
class File:
    data: bytearray = field(default_factory=bytearray)
    xattrs: dict[str, bytes] = field(default_factory=dict)
    links: int = 1


@dataclass
class Symlink:
    target: str
    links: int = 1


@dataclass
class Directory:
    names: dict[str, Node] = field(default_factory=dict)
    xattrs: dict[str, bytes] = field(default_factory=dict)


Node = File | Symlink | Directory


def fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


class Model:
    def __init__(self) -> None:
        self.root = Directory()

    # ---- looking

    def find(self, path: str) -> Node | None:
        """What a path leads to; None if its last name is absent, OSError if the way there is."""
        directory, name = self._place(path)
        return directory.names.get(name)

    def _place(self, path: str) -> tuple[Directory, str]:
        *way, name = path.split("/")
        node: Node = self.root
        for part in way:
            if isinstance(node, File):
                fail(errno.ENOTDIR)
            found = node.names.get(part) if isinstance(node, Directory) else None
            node = found or fail(errno.ENOENT)
        if isinstance(node, Directory):
            return node, name
        # Targets of symbolic links are absent everywhere.
        fail(errno.ENOENT if isinstance(node, Symlink) else errno.ENOTDIR)

    def existing(self, path: str) -> Node:
        return self.find(path) or fail(errno.ENOENT)

    def file(self, path: str) -> File:
        """What can be opened for writing, and truncated."""
        node = self.existing(path)
        if isinstance(node, Directory):
            fail(errno.EISDIR)
        return node if isinstance(node, File) else fail(errno.ENOENT)

    def paths(self) -> list[tuple[str, Node]]:
        """Everything, with its path."""
        found: list[tuple[str, Node]] = []
        todo = [("", self.root)]
        while todo:
            prefix, directory = todo.pop()
            for name, node in directory.names.items():
                found.append((prefix + name, node))
                if isinstance(node, Directory):
                    todo.append((f"{prefix}{name}/", node))
        return found

    def picture(self) -> dict[str, object]:
        """As `picture` of the directory must be: path, and what is to be seen of it."""
        first: dict[int, str] = {}
        seen: dict[str, object] = {}
        for path, node in sorted(self.paths(), key=lambda item: item[0]):
            if isinstance(node, Directory):
                seen[path] = ("directory", node.xattrs)
            elif isinstance(node, Symlink):
                seen[path] = ("symlink", node.target, node.links, first.setdefault(id(node), path))
            else:
                same = first.setdefault(id(node), path)
                seen[path] = ("file", bytes(node.data), node.xattrs, node.links, same)
        return seen

    # ---- names

    def _new(self, path: str) -> tuple[Directory, str]:
        directory, name = self._place(path)
        if name in directory.names:
            fail(errno.EEXIST)
        return directory, name

    def mkdir(self, path: str) -> None:
        directory, name = self._new(path)
        directory.names[name] = Directory()

    def create(self, path: str) -> None:
        directory, name = self._new(path)
        directory.names[name] = File()

    def symlink(self, target: str, path: str) -> None:
        directory, name = self._new(path)
        directory.names[name] = Symlink(target)

    def link(self, old: str, new: str) -> None:
        node = self.existing(old)
        directory, name = self._new(new)
        if isinstance(node, Directory):
            fail(errno.EPERM)
        node.links += 1
        directory.names[name] = node

    def unlink(self, path: str) -> None:
        directory, name = self._place(path)
        node = self.existing(path)
        if isinstance(node, Directory):
            fail(errno.EISDIR)
        node.links -= 1
        del directory.names[name]

    def rmdir(self, path: str) -> None:
        directory, name = self._place(path)
        node = self.existing(path)
        if not isinstance(node, Directory):
            fail(errno.ENOTDIR)
        if node.names:
            fail(errno.ENOTEMPTY)
        del directory.names[name]

    def rename(self, old: str, new: str) -> None:
        source, old_name = self._place(old)
        target, new_name = self._place(new)
        node, there = self.existing(old), target.names.get(new_name)
        if new.startswith(f"{old}/"):
            fail(errno.EINVAL)
        if old.startswith(f"{new}/"):
            fail(errno.ENOTEMPTY)
        if node is there:
            return
        if there is not None:
            self._check_replaced(node, there)
        if there is not None and not isinstance(there, Directory):
            there.links -= 1
        del source.names[old_name]
        target.names[new_name] = node

    def _check_replaced(self, node: Node, there: Node) -> None:
        if isinstance(node, Directory) and not isinstance(there, Directory):
            fail(errno.ENOTDIR)
        if isinstance(there, Directory) and not isinstance(node, Directory):
            fail(errno.EISDIR)
        if isinstance(there, Directory) and there.names:
            fail(errno.ENOTEMPTY)

    # ---- contents

    def truncate(self, path: str, size: int) -> None:
        resize(self.file(path), size)

    def read(self, path: str) -> bytes:
        return bytes(self.file(path).data)

    def look(self, path: str) -> tuple[object, ...]:
        """Kind; and size and links where these are sure."""
        node = self.existing(path)
        if isinstance(node, Directory):
            return ("directory",)
        if isinstance(node, Symlink):
            return ("symlink", node.target, node.links)
        return ("file", len(node.data), node.links)

    def listing(self, path: str) -> list[str]:
        node = self.existing(path)
        if isinstance(node, Symlink):
            fail(errno.ENOENT)
        return sorted(node.names) if isinstance(node, Directory) else fail(errno.ENOTDIR)

    # ---- extended attributes

    def _xattrs(self, path: str) -> dict[str, bytes]:
        node = self.existing(path)
        return fail(errno.ENOENT) if isinstance(node, Symlink) else node.xattrs

    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        xattrs = self._xattrs(path)
        if flags == os.XATTR_CREATE and name in xattrs:
            fail(errno.EEXIST)
        if flags == os.XATTR_REPLACE and name not in xattrs:
            fail(errno.ENODATA)
        xattrs[name] = value

    def removexattr(self, path: str, name: str) -> None:
        xattrs = self._xattrs(path)
        if name not in xattrs:
            fail(errno.ENODATA)
        del xattrs[name]


def resize(file: File, size: int) -> None:
    del file.data[size:]
    file.data.extend(bytes(size - len(file.data)))


def write_at(file: File, data: bytes, at: int) -> None:
    if len(file.data) < at:
        resize(file, at)
    file.data[at : at + len(data)] = data


def picture(top: str) -> dict[str, object]:
    """What is to be seen of everything below a real directory, as `Model.picture`."""
    first: dict[tuple[int, int], str] = {}
    seen: dict[str, object] = {}
    everything = ((root, name) for root, names, files in os.walk(top) for name in names + files)
    for path in sorted(os.path.join(root, name) for root, name in everything):
        relative = os.path.relpath(path, top)
        status = os.lstat(path)
        same = first.setdefault((status.st_dev, status.st_ino), relative)
        if os.path.islink(path):
            seen[relative] = ("symlink", os.readlink(path), status.st_nlink, same)
        elif os.path.isdir(path):
            seen[relative] = ("directory", _user_xattrs(path))
        else:
            with open(path, "rb") as file:
                seen[relative] = ("file", file.read(), _user_xattrs(path), status.st_nlink, same)
    return seen


def _user_xattrs(path: str) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path) if name.startswith("user.")}
