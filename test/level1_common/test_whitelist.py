"""The whitelist's parser: what users write is understood, and every mistake is named with file and line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtfs_common.errors import ConfigError
from qtfs_common.whitelist import Type, Whitelist, load_whitelist, parse_whitelist

NOBODY = 65534


def parse(text: bytes) -> Whitelist:
    return parse_whitelist(text, "wl")


def test_type_numbers_are_fixed() -> None:
    names = [
        "OPEN",
        "WRITE",
        "READ",
        "READDIR",
        "MKDIR",
        "RMDIR",
        "CREATE",
        "UNLINK",
        "RENAME",
        "SETATTR",
        "SETXATTR",
        "MOUNT",
        "KILL",
        "UDSCONNECT",
    ]
    assert [(type_.name, type_.value) for type_ in Type] == [(name, number) for number, name in enumerate(names)]


def test_libvirts_list_reads_as_users_write_it(tmp_path: Path) -> None:
    path = tmp_path / "whitelist"
    path.write_text("# libvirt\n\n[Mount]\nPath=/nx/VMs;/nx/lib/libvirt;/nx/vfio\n\n[Kill]\nPath=qemu-kvm;virtlogd;\n")
    whitelist = load_whitelist(path)
    assert whitelist.source == str(path)
    assert whitelist.paths[Type.MOUNT] == (b"/nx/VMs", b"/nx/lib/libvirt", b"/nx/vfio")
    assert whitelist.commands == (b"qemu-kvm", b"virtlogd")
    assert whitelist.paths[Type.OPEN] == ()
    assert Type.KILL not in whitelist.paths


def test_every_group_goes_to_its_type() -> None:
    groups = [
        "Open",
        "Write",
        "Read",
        "Readdir",
        "Mkdir",
        "Rmdir",
        "Create",
        "Unlink",
        "Rename",
        "Setattr",
        "Setxattr",
        "Mount",
        "Udsconnect",
    ]
    text = "".join(f"[{group}]\nPath=/nx/{group}\n" for group in groups)
    paths = parse(text.encode()).paths
    assert [(type_.group, *entries) for type_, entries in paths.items()] == [
        (group, f"/nx/{group}".encode()) for group in groups
    ]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (b"/nx", b"/nx"),
        (b"/nx/", b"/nx"),
        (b"//nx///a//", b"/nx/a"),
        (b"/./nx/./a/.", b"/nx/a"),
        (b"/", b"/"),
        (b"///", b"/"),
        (b"/nx/..a/b..", b"/nx/..a/b.."),
        (b" \t/nx/a b ", b"/nx/a b"),
        (rb"/nx/a\;b\\c\sd\te", b"/nx/a;b\\c d\te"),
        (rb"/nx/end\s", b"/nx/end "),
        (b"/nx/\xff\xc3\xa9", b"/nx/\xff\xc3\xa9"),
        (b"/nx/a=b#c[d]", b"/nx/a=b#c[d]"),
        (b"/" + b"x" * 4094, b"/" + b"x" * 4094),
    ],
)
def test_paths_are_normalised(written: bytes, meant: bytes) -> None:
    assert parse(b"[Open]\nPath=" + written + b";").paths[Type.OPEN] == (meant,)


def test_repetition_adds_up_and_duplicates_do_no_harm() -> None:
    text = b"[Open]\nPath=/nx/a;/nx/a/;/nx/b\nPath=/nx/c\n[Read]\nPath=/nx/r\n[Open]\nPath=/nx/b;/nx/d\n"
    whitelist = parse(text)
    assert whitelist.paths[Type.OPEN] == (b"/nx/a", b"/nx/b", b"/nx/c", b"/nx/d")
    assert whitelist.paths[Type.READ] == (b"/nx/r",)


@pytest.mark.parametrize("text", [b"", b"[Open]", b"[Open]\nPath=", b"[Open]\nPath=;; ;\t;", b"\n\n#\n # x\n"])
def test_nothing_is_nothing(text: bytes) -> None:
    whitelist = parse(text)
    assert not any(whitelist.paths.values())
    assert not whitelist.commands


def test_blanks_and_dos_line_ends_do_not_matter() -> None:
    assert parse(b"  [Open]\t\r\n  Path =  /nx/a ; /nx/b \r\n").paths[Type.OPEN] == (b"/nx/a", b"/nx/b")


def test_more_than_the_originals_64_entries() -> None:
    entries = [f"/nx/{number}".encode() for number in range(1000)]
    assert parse(b"[Open]\nPath=" + b";".join(entries)).paths[Type.OPEN] == tuple(entries)


def test_symbolic_links_add_their_targets(tmp_path: Path) -> None:
    real = Path(os.path.realpath(tmp_path))
    (real / "run").mkdir()
    (real / "var_run").symlink_to("run")
    entries = parse(f"[Mount]\nPath={real}/var_run/docker;{real}/plain".encode()).paths[Type.MOUNT]
    assert [os.fsdecode(entry) for entry in entries] == [
        f"{real}/var_run/docker",
        f"{real}/run/docker",
        f"{real}/plain",
    ]


MISTAKES = [
    (b"Path=/a\n", 1, "'Path=/a' stands outside any group"),
    (b"\n[Opne]\n", 2, "unknown group [Opne]"),
    (b"[open]\n", 1, "unknown group [open]"),
    (b"[Open \n", 1, "group '[Open' has no closing bracket"),
    (b"[]\n", 1, "unknown group []"),
    (b"[Open]\n#\nPaths=/a\n", 3, "unknown key 'Paths'"),
    (b"[Open]\npath=/a\n", 2, "unknown key 'path'"),
    (b"[Open]\nPath[de]=/a\n", 2, "unknown key 'Path[de]'"),
    (b"[Open]\n/a;/b\n", 2, "'/a;/b' is neither"),
    (b"[Open]\nPath=/a\n     /b\n", 3, "'/b' is neither"),
    (b"[Open]\nPath=/a;b/c\n", 2, "'b/c' is not an absolute path"),
    (b"[Open]\nPath=~/x\n", 2, "'~/x' is not an absolute path"),
    (b"[Open]\nPath=/a/../b\n", 2, "'/a/../b' contains '..'"),
    (b"[Open]\nPath=/..\n", 2, "'/..' contains '..'"),
    (b"[Open]\nPath=/a\nPath=/b\0c\n", 3, "NUL byte"),
    (b"# \0\n", 1, "NUL byte"),
    (b"[Open]\nPath=/a\\qb\n", 2, r"unknown escape '\q'"),
    (b"[Open]\nPath=/a\\\n", 2, "unknown escape '\\'"),
    (b"[Open]\nPath=/" + b"x" * 4095 + b"\n", 2, "path longer than 4095 bytes"),
    (b"[Kill]\nPath=ls;/bin/kill\n", 2, "'/bin/kill' is a path"),
    (b"[\xff]\n", 1, r"unknown group [\xff]"),
]


@pytest.mark.parametrize(("text", "line", "reason"), MISTAKES)
def test_every_mistake_is_named_with_file_and_line(tmp_path: Path, text: bytes, line: int, reason: str) -> None:
    path = tmp_path / "whitelist"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load_whitelist(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert reason in str(caught.value)
    assert caught.value.line == line


@contextmanager
def as_nobody() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/no: cannot read the whitelist: No such file")):
        load_whitelist(tmp_path / "no")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "whitelist"
    path.touch(mode=0)
    with as_nobody(), pytest.raises(ConfigError, match=re.escape(f"{path}: cannot read the whitelist: Permission")):
        load_whitelist(path)


def test_what_is_not_a_regular_file_is_named_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/fifo: the whitelist is not a regular file")):
        load_whitelist(tmp_path / "fifo")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}: ")):
        load_whitelist(tmp_path)


def test_without_mount_the_engine_is_told_why_it_cannot_start() -> None:
    parse(b"[Mount]\nPath=/nx").require_mount()
    for text in (b"", b"[Mount]\n", b"[Mount]\nPath=;\n", b"[Open]\nPath=/nx\n"):
        with pytest.raises(ConfigError, match=r"^wl: group \[Mount\] has no path.*does not start"):
            parse(text).require_mount()


@pytest.mark.parametrize(
    ("rule", "path", "permitted"),
    [
        (b"/nx/a", b"/nx/a", True),
        (b"/nx/a", b"/nx/a/b/c", True),
        (b"/nx/a", b"/nx/ab", False),
        (b"/nx/a", b"/nx", False),
        (b"/nx/a/", b"/nx/a", True),
        (b"/", b"/", True),
        (b"/", b"/anything", True),
    ],
)
def test_rules_are_prefixes_on_component_boundaries(rule: bytes, path: bytes, permitted: bool) -> None:
    whitelist = parse(b"[Read]\nPath=" + rule)
    assert whitelist.permits(Type.READ, path) is permitted
    assert whitelist.permits(Type.WRITE, path) is False


# --------------------------------------------------------------------------------------------------------- properties

NAMES = st.binary(min_size=1, max_size=12).filter(
    lambda name: name not in (b".", b"..") and not set(name) & set(b"/\0")
)
# Below a directory that does not exist, so that no link of this machine takes part.
PATHS = st.lists(NAMES, min_size=1, max_size=5).map(lambda names: b"/nx." + b"/".join(names))
LISTS = st.dictionaries(
    st.sampled_from([type_ for type_ in Type if type_ is not Type.KILL]), st.lists(PATHS, unique=True)
)
ESCAPED = {b"\\": rb"\\", b";": rb"\;", b" ": rb"\s", b"\t": rb"\t", b"\n": rb"\n", b"\r": rb"\r"}


def escape(path: bytes) -> bytes:
    # \v and \f have no escape and count as blanks at the ends of an entry.
    return b"".join(ESCAPED.get(bytes([byte]), bytes([byte])) for byte in path)


@given(LISTS)
def test_what_is_written_is_read(lists: dict[Type, list[bytes]]) -> None:
    lists = {type_: [path + b"." for path in paths] for type_, paths in lists.items()}
    text = b"".join(
        f"[{type_.group}]\nPath=".encode() + b"".join(escape(path) + b";" for path in paths) + b"\n"
        for type_, paths in lists.items()
    )
    found = {type_: list(paths) for type_, paths in parse(text).paths.items() if paths}
    assert found == {type_: paths for type_, paths in lists.items() if paths}


@given(
    st.binary(max_size=200)
    | st.lists(
        st.sampled_from(
            [b"[Open]", b"[Kill]", b"Path=", b"/a", b";", b"\n", b"\\", b" ", b"..", b"/", b"#", b"\0", b"x"]
        ),
        max_size=30,
    ).map(b"".join)
)
def test_any_bytes_give_normal_absolute_paths_or_a_named_line(text: bytes) -> None:
    try:
        whitelist = parse(text)
    except ConfigError as error:
        assert error.line is not None and 1 <= error.line <= text.count(b"\n") + 1
        assert str(error).startswith(f"wl:{error.line}: ")
        return
    for path in sum(whitelist.paths.values(), ()):
        assert path == b"/" or (path.startswith(b"/") and not set(path[1:].split(b"/")) & {b"", b".", b".."})
    assert not any(b"/" in command or not command for command in whitelist.commands)
