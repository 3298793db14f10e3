"""The client's driver between a kernel and an engine that the test plays: what an engine may not do to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzz.client_target import ClientTarget, put_off_once
from harness import wire
from harness.waiting import wait_until
from harness.wire import EVENT_SLOT

from qtfs_common.protocol import OPERATIONS


@pytest.fixture
def target() -> Iterator[ClientTarget]:
    made = ClientTarget()
    yield made
    made.close()


def test_what_is_put_off_is_tried_again_by_the_only_worker(target: ClientTarget) -> None:
    """Which waits for the kernel's next request when it is due, and nobody can be started beside it."""
    target.one(put_off_once())


def tell_mounts_changed(target: ClientTarget, number: int, size: int) -> None:
    body = wire.message(OPERATIONS["MOUNTS_CHANGED"], bytes(size), slot=EVENT_SLOT, sequence=number)
    target.event_socket.sendall(body)


def test_long_messages_of_changed_mounts_are_kept_without_their_names(target: ClientTarget) -> None:
    """A thousand of a megabyte would be a gigabyte; that something has changed is known all the same."""
    found: list[int] = []
    for number, size in ((1, 16), (2, 65536), (3, 65544), (4, 1 << 20)):
        tell_mounts_changed(target, number, size)

    def all_came() -> bool:
        found.extend(len(body) for body in target.mount.take_changes())
        return len(found) >= 5

    wait_until(all_came, "four messages, and the one that a fresh event channel stands for")
    assert found == [0, 16, 65536, 0, 0]
