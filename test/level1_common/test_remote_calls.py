"""Records of the server's mounts and processes: there and back, and that rubbish is refused by ValueError alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qtfs_common import remote_calls as calls
from qtfs_common.remote_calls import Action, MountCall, MountFlag, Option, OptionKind

TEXT = st.binary(max_size=40).map(lambda data: data.replace(b"\0", b"x"))
OPTION = st.builds(Option, st.sampled_from(OptionKind), TEXT, TEXT)
MOUNT = st.builds(
    MountCall,
    action=st.sampled_from(Action),
    target=TEXT,
    source=TEXT,
    type=TEXT,
    flags=st.integers(0, 15).map(MountFlag),
    attributes_set=st.integers(0, (1 << 64) - 1),
    attributes_clear=st.integers(0, (1 << 64) - 1),
    propagation=st.integers(0, (1 << 32) - 1),
    options=st.lists(OPTION, max_size=5).map(tuple),
)
U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
PROCESS = st.builds(
    calls.ProcessRecord, U32, U32, U32, st.sampled_from("RSDZ"), U64, st.integers(-(1 << 63), (1 << 63) - 1), TEXT
)
LISTED = st.builds(calls.MountRecord, U64, U64, U32, U32, TEXT, TEXT, TEXT, TEXT, TEXT)


@given(MOUNT)
def test_a_mount_there_and_back(call: MountCall) -> None:
    assert calls.parse_mount(calls.pack_mount(call)) == call


@given(TEXT, U32)
def test_an_umount_there_and_back(target: bytes, flags: int) -> None:
    assert calls.parse_umount(calls.pack_umount(calls.UmountCall(target, flags))) == (target, flags)


@given(st.lists(PROCESS, max_size=5))
def test_processes_there_and_back(processes: list[calls.ProcessRecord]) -> None:
    packed = b"".join(map(calls.pack_process, processes))
    assert len(packed) % 8 == 0 and list(calls.process_records(packed)) == processes


@given(U64, U32, st.lists(LISTED, max_size=5))
def test_mounts_there_and_back(token: int, total: int, mounts: list[calls.MountRecord]) -> None:
    packed = calls.pack_page(token, total, list(map(calls.pack_mount_record, mounts)))
    assert calls.parse_page(packed) == (token, total, tuple(mounts))


@given(st.sets(st.integers(0, 8191), max_size=20))
def test_processors_there_and_back(cpus: set[int]) -> None:
    mask = calls.mask_of(cpus)
    assert calls.cpus_of(mask) == cpus and len(mask) % 8 == 0 and len(mask) <= calls.MOST_MASK_BYTES


@pytest.mark.parametrize("cpus", [{8192}, {-1}])
def test_processors_that_cannot_be(cpus: set[int]) -> None:
    with pytest.raises(ValueError):
        calls.mask_of(cpus)


PARSERS: tuple[Callable[[bytes], object], ...] = (
    calls.parse_mount,
    calls.parse_umount,
    calls.parse_kill,
    calls.parse_affinity,
    calls.parse_processes,
    calls.parse_list,
    calls.parse_page,
    lambda data: list(calls.process_records(data)),
)


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xff" * 200)
@example(bytes(200))
def test_rubbish(data: bytes) -> None:
    for parse in PARSERS:
        with contextlib.suppress(ValueError):
            parse(data)


@given(MOUNT, st.data())
def test_a_mount_cut_short_or_too_long(call: MountCall, data: st.DataObject) -> None:
    packed = calls.pack_mount(call)
    end = data.draw(st.integers(0, len(packed) - 1))
    for wrong in (packed[:end], packed + b"x"):
        with pytest.raises(ValueError):
            calls.parse_mount(wrong)
