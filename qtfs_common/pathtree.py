"""Patterns of paths as a tree in which a path has one place, however many patterns match it.

A component of a pattern is a name, ``*`` (any one component) or ``[pid]`` (a decimal number). After
:meth:`PathTree.rows` a path is followed by the branch of its name, else that of ``[pid]`` if it is a number, else that
of ``*``; nothing has to be tried twice. qtfs_common.tries keeps such a tree in C.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

ANY = b"*"
NUMBER = b"[pid]"
#: Branches of one tree; what is more is refused, for patterns with many wildcards multiply each other.
MAX_BRANCHES = 65534
_LONGEST_NUMBER = 10

Mark = TypeVar("Mark")


def components(path: bytes) -> tuple[bytes, ...]:
    """The components of an absolute path; none for ``/``."""
    return tuple(filter(None, path.split(b"/")))


def is_number(name: bytes) -> bool:
    """Whether ``[pid]`` stands for a name."""
    return name.isdigit() and len(name) <= _LONGEST_NUMBER and (name == b"0" or name[0] != ord("0"))


class Branch(Generic[Mark]):
    """Where all paths go on that have come as far. ``marks`` are those of the patterns that end here."""

    __slots__ = ("children", "marks")

    def __init__(self) -> None:
        self.children: dict[bytes, Branch[Mark]] = {}
        self.marks: list[Mark] = []


class Row(NamedTuple, Generic[Mark]):
    """A branch and its name below the row of index ``parent``; the root is its own parent."""

    parent: int
    name: bytes
    branch: Branch[Mark]


class PathTree(Generic[Mark]):
    """Marks on patterns of paths."""

    def __init__(self) -> None:
        self._root: Branch[Mark] = Branch()
        self._size = 1

    def add(self, pattern: tuple[bytes, ...], mark: Mark) -> None:
        """Put a mark on a pattern. Raises ValueError if the tree gets too large."""
        at = self._root
        for name in pattern:
            at = self._child(at, name)
        at.marks.append(mark)

    def rows(self) -> list[Row[Mark]]:
        """All branches, each behind its parent, wildcards worked into the names that they match. Raises ValueError."""
        rows = [Row(0, b"", self._root)]
        for index, row in enumerate(rows):  # grows as it goes
            self._settle(row.branch)
            rows += [Row(index, name, child) for name, child in row.branch.children.items()]
        return rows

    def _child(self, parent: Branch[Mark], name: bytes) -> Branch[Mark]:
        child = parent.children.get(name)
        if child is None:
            self._size += 1
            if self._size > MAX_BRANCHES:
                raise ValueError(f"its paths have more than {MAX_BRANCHES} components, wildcards multiplied")
            child = parent.children[name] = Branch()
        return child

    def _merge(self, target: Branch[Mark], other: Branch[Mark]) -> None:
        target.marks += other.marks
        for name, child in other.children.items():
            self._merge(self._child(target, name), child)

    def _settle(self, branch: Branch[Mark]) -> None:
        anything, number = branch.children.get(ANY), branch.children.get(NUMBER)
        if number is not None and anything is not None:
            self._merge(number, anything)
        for name, child in branch.children.items():
            if name in (ANY, NUMBER):
                continue
            wild = number if number is not None and is_number(name) else anything
            if wild is not None:
                self._merge(child, wild)
