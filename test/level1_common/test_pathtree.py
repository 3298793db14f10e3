"""Patterns with wildcards: a path followed branch by branch meets the marks of all patterns that it matches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtfs_common.pathtree import ANY, MAX_BRANCHES, NUMBER, PathTree, components, is_number

NAMES = st.sampled_from([b"a", b"b", b"7", b"42"])
PATTERNS = st.lists(st.tuples() | st.lists(NAMES | st.sampled_from([ANY, NUMBER]), max_size=4).map(tuple), max_size=8)


def marks_on(tree: PathTree[int], path: tuple[bytes, ...]) -> set[int]:
    """As qtfs_common.tries follows it."""
    rows = tree.rows()
    at = 0
    for name in path:
        below = {row.name: index for index, row in enumerate(rows) if index and row.parent == at}
        wild = below.get(NUMBER) if is_number(name) else None
        found = below.get(name, wild if wild is not None else below.get(ANY))
        if found is None:
            return set()
        at = found
    return set(rows[at].branch.marks)


def matches(pattern: tuple[bytes, ...], path: tuple[bytes, ...]) -> bool:
    return len(pattern) == len(path) and all(
        p in (ANY, name) or (p == NUMBER and is_number(name)) for p, name in zip(pattern, path, strict=True)
    )


@given(PATTERNS, st.lists(NAMES | st.just(b"other"), max_size=5).map(tuple))
def test_a_path_has_the_marks_of_all_patterns_it_matches(
    patterns: list[tuple[bytes, ...]], path: tuple[bytes, ...]
) -> None:
    tree: PathTree[int] = PathTree()
    for number, pattern in enumerate(patterns):
        tree.add(pattern, number)
    assert marks_on(tree, path) == {number for number, pattern in enumerate(patterns) if matches(pattern, path)}


def test_parents_come_before_children() -> None:
    tree: PathTree[int] = PathTree()
    tree.add((b"a", ANY, b"b"), 1)
    tree.add((b"a", b"x", b"c"), 2)
    rows = tree.rows()
    assert rows[0].name == b"" and all(row.parent < index for index, row in enumerate(rows) if index)


def test_too_many_branches_are_refused() -> None:
    """Each of so many names goes on with each name that may follow anything."""
    tree: PathTree[int] = PathTree()
    for number in range(300):
        tree.add((b"x%d" % number,), number)
        tree.add((ANY, b"y%d" % number), number)
    with pytest.raises(ValueError, match=str(MAX_BRANCHES)):
        tree.rows()


@pytest.mark.parametrize("name", [b"0", b"1", b"4194304", b"9999999999"])
def test_numbers(name: bytes) -> None:
    assert is_number(name)


@pytest.mark.parametrize("name", [b"", b"01", b"1a", b"-1", b"12345678901", "\u0663".encode()])
def test_no_numbers(name: bytes) -> None:
    assert not is_number(name)


def test_components() -> None:
    assert components(b"/") == () and components(b"//a/b/") == (b"a", b"b")
