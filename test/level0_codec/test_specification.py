"""doc/protocol.md and the code hold the same numbers, limits, records and guarantees, in both directions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qtfs_common import protocol

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "doc/protocol.md").read_text()
DECLARATIONS = (ROOT / "qtfs_common/protocol.pxd").read_text()

_BYTES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "i32": 4, "i64": 8}
#: Records that stand inside others only, so that the table of sizes does not list them.
_PARTS = {"timestamp"}


def rows(pattern: str) -> list[tuple[str, ...]]:
    """The groups of every table row that begins like this."""
    return [match.groups() for match in re.finditer(rf"^\| {pattern}", DOCUMENT, re.MULTILINE)]


def pairs(pattern: str) -> list[tuple[str, str]]:
    return [(first, second) for first, second in rows(pattern)]


def operations_of_the_document() -> list[tuple[int, str]]:
    return [(int(number), name) for number, name in rows(r"(\d+) \| ([A-Z_]+) \|")]


# ---- operations


def test_operations_are_those_of_the_document() -> None:
    documented = operations_of_the_document()
    assert {name: number for number, name in documented} == protocol.OPERATIONS
    assert len(documented) == len(protocol.OPERATIONS), "an operation stands there twice"


def test_no_number_is_given_out_twice() -> None:
    assert len(set(protocol.OPERATIONS.values())) == len(protocol.OPERATIONS)
    assert {number: name for name, number in protocol.OPERATIONS.items()} == protocol.OPERATION_NAMES


def test_every_declared_operation_has_its_name() -> None:
    declared = dict(re.findall(r"^    OP_([A-Z_]+) = (\d+)", DECLARATIONS, re.MULTILINE))
    table_size = int(declared.pop("COUNT"))
    assert {name: int(number) for name, number in declared.items()} == protocol.OPERATIONS
    assert max(protocol.OPERATIONS.values()) < table_size


def test_guarantees_are_those_of_the_engines_table() -> None:
    guarantees = dict(pairs(r"\d+ \| ([A-Z_]+) \|[^|]*\|[^|]*\| ([a-z ]+) \|"))
    source = (ROOT / "qtfs_server/dispatch.pyx").read_text()
    defined = dict(re.findall(r"^_define\(OP_([A-Z_]+), [\w.]+, (True|False)\)", source, re.MULTILINE))
    assert set(defined) == {name for name, number in protocol.OPERATIONS.items() if number >= 16}
    expected = {
        name: {"once": "False", "repeatable": "True", "event channel": defined[name]}[guarantees[name]]
        for name in defined
    }
    assert defined == expected


# ---- limits, constants


def test_limits_are_those_of_the_document() -> None:
    assert {name: int(value) for name, value in rows(r"(MAX_[A-Z]+) \| (\d+) \|")} == protocol.LIMITS


def test_every_declared_limit_is_published() -> None:
    assert set(re.findall(r"^    (MAX_[A-Z]+) =", DECLARATIONS, re.MULTILINE)) == set(protocol.LIMITS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("MAGIC", r"`magic` is (0x[0-9a-f]+), the bytes \"QTFS\""),
        ("EVENT", r"u32 slot;.* (0x[0-9a-f]+) on the event channel"),
        ("VERSION", r"# The qtfs wire protocol, version (\d+)"),
        ("ROOT", r"The root of the session is node\s+(\d+)\."),
        ("REPLY", r"u16 flags;\s+// (\d+) \(REPLY\) in replies"),
    ],
)
def test_constants_are_those_of_the_document(name: str, words: str) -> None:
    found = re.search(words, DOCUMENT)
    assert found, f"the document does not say what {name} is"
    assert int(found.group(1), 0) == getattr(protocol, name)


# ---- records

Fields = list[tuple[str, str]]


def _fields(text: str, separator: str) -> Fields:
    """(type, name) of each field; `u32 a, b` are two. An array's length may stand behind the type or the name."""
    found: Fields = []
    for statement in filter(None, (part.strip() for part in text.split(separator))):
        kind, _, names = statement.partition(" ")
        for name in names.split(","):
            plain, bracket, count = name.strip().partition("[")
            found.append((kind + (f"[{count}" if bracket else ""), plain))
    return found


def records_of_the_document() -> dict[str, Fields]:
    found: dict[str, Fields] = {}
    for block in re.findall(r"```c\n(.*?)```", DOCUMENT, re.DOTALL):
        text = re.sub(r"//.*", "", block)
        for name, body in re.findall(r"(\w+) \{([^}]*)\}", text):
            assert name not in found, f"{name} is specified twice"
            found[name] = _fields(" ".join(body.split()), ";")
    return found


def records_of_the_code() -> dict[str, Fields]:
    found: dict[str, Fields] = {}
    pattern = re.compile(r"^cdef packed struct (\w+):.*\n((?:    .*\n)+)", re.MULTILINE)
    for name, body in pattern.findall(DECLARATIONS):
        plain = re.sub(r"#.*", "", body)
        plain = re.sub(r"\buint(\d+)_t\b", r"u\1", re.sub(r"\bint(\d+)_t\b", r"i\1", plain))
        found[name] = _fields(plain, "\n")
    return found


def _size(kind: str, records: dict[str, Fields]) -> int:
    plain, _, count = kind.partition("[")
    one = _BYTES[plain] if plain in _BYTES else sum(_size(field, records) for field, _ in records[plain])
    return one * int(count.rstrip("]") or 1) if count else one


def test_record_sizes_are_those_of_the_document() -> None:
    documented = rows(r"record `(\w+)` \| (\d+) \|")
    assert {name: int(size) for name, size in documented} == protocol.RECORD_BYTES
    assert len(documented) == len(protocol.RECORD_BYTES), "a record stands there twice"


def test_every_declared_record_is_published() -> None:
    assert set(records_of_the_code()) - _PARTS == set(protocol.RECORD_BYTES)


@pytest.mark.parametrize("name", sorted(records_of_the_code()))
def test_the_fields_of_a_record_are_those_of_the_document(name: str) -> None:
    assert records_of_the_document()[name] == records_of_the_code()[name]


def test_the_document_specifies_no_other_record() -> None:
    assert set(records_of_the_document()) == set(records_of_the_code())


@pytest.mark.parametrize("name", sorted(protocol.RECORD_BYTES))
def test_specified_fields_add_up_to_the_size(name: str) -> None:
    records = records_of_the_document()
    assert sum(_size(kind, records) for kind, _ in records[name]) == protocol.RECORD_BYTES[name]
