"""Who gets a lock next, and who never would: order of waits, EDEADLK."""

from __future__ import annotations

import errno
import fcntl
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess
from harness.locking import FLOCK, READ, UNLOCK, WRITE, Opened
from harness.session import Session
from harness.waiting import wait_until

FILES = ("a", "b", "c")
EDEADLK = errno.EDEADLK


class Party:
    """An owner of a session and its handles on all files."""

    def __init__(self, session: Session, owner: int) -> None:
        self.files = {name: Opened(session, name) for name in FILES}
        self.owner = owner
        self.session = session

    def lock(self, name: str, kind: int = WRITE, start: int = 0, end: int = 9) -> int:
        return self.files[name].lock(kind, start, end, self.owner)

    def wait(self, name: str, kind: int = WRITE, start: int = 0, end: int = 9, tag: int = 0) -> None:
        """SETLKW, with the owner's number for a tag unless there is another."""
        self.files[name].wait(kind, tag or self.owner, start, end, self.owner)

    def outcome(self) -> tuple[int, int]:
        return self.files["a"].outcome()

    def is_waiting(self) -> bool:
        return self.files["a"].is_waiting()

    def waits(self, name: str, kind: int = WRITE, start: int = 0, end: int = 9, tag: int = 0) -> bool:
        """SETLKW is sent, and has not ended when the engine has seen it."""
        self.wait(name, kind, start, end, tag)
        return self.is_waiting()


@pytest.fixture(params=["sessions", "owners"])
def parties(request: pytest.FixtureRequest, engine: EngineProcess, share: Path) -> Iterator[list[Party]]:
    """Three, each in a session of its own and all under one owner's number; or three owners of one session."""
    for name in FILES:
        (share / name).touch()
    with ExitStack() as stack:
        if request.param == "sessions":
            yield [Party(stack.enter_context(Session(engine.address, share)), 1) for _ in range(3)]
        else:
            session = stack.enter_context(Session(engine.address, share))
            yield [Party(session, number) for number in (1, 2, 3)]


# ---- deadlocks


def test_two_that_wait_for_each_other(parties: list[Party]) -> None:
    one, two, _ = parties
    assert one.lock("a") == two.lock("b") == 0
    assert one.waits("b")
    two.wait("a")
    assert two.outcome() == (two.owner, EDEADLK)
    assert one.is_waiting(), "one of them is told, the other goes on"
    assert two.lock("b", UNLOCK) == 0
    assert one.outcome() == (one.owner, 0)


def test_a_circle_of_three(parties: list[Party]) -> None:
    for party, name in zip(parties, FILES, strict=True):
        assert party.lock(name) == 0
    one, two, three = parties
    assert one.waits("b") and two.waits("c")
    three.wait("a")
    assert three.outcome() == (three.owner, EDEADLK)
    assert three.lock("c", UNLOCK) == 0
    assert two.outcome() == (two.owner, 0)


def test_a_circle_within_one_file(parties: list[Party]) -> None:
    one, two, _ = parties
    assert one.lock("a", WRITE, 0, 9) == two.lock("a", WRITE, 10, 19) == 0
    assert one.waits("a", WRITE, 15, 15)
    two.wait("a", READ, 0, 0)
    assert two.outcome() == (two.owner, EDEADLK)


def test_two_readers_that_both_want_to_write(parties: list[Party]) -> None:
    one, two, _ = parties
    assert one.lock("a", READ) == two.lock("a", READ) == 0
    assert one.waits("a", WRITE)
    two.wait("a", WRITE)
    assert two.outcome() == (two.owner, EDEADLK)
    assert two.lock("a", UNLOCK) == 0
    assert one.outcome() == (one.owner, 0)


def test_a_circle_through_one_of_many_readers(parties: list[Party]) -> None:
    one, two, three = parties
    assert one.lock("a", READ) == two.lock("a", READ) == three.lock("b") == 0
    assert two.waits("b")
    three.wait("a", WRITE)
    assert three.outcome() == (three.owner, EDEADLK)
    assert two.is_waiting()


@pytest.mark.parametrize("release", [UNLOCK, READ])
def test_no_deadlock_once_the_circle_is_open(parties: list[Party], release: int) -> None:
    """What was held is held no more, or allows what is asked for."""
    one, two, _ = parties
    assert one.lock("a") == two.lock("b") == 0
    assert one.waits("b")
    assert one.lock("a", release, 0, 4) == 0
    two.wait("a", READ, 0, 4)
    assert two.outcome() == (two.owner, 0)


def test_no_deadlock_where_ranges_do_not_meet(parties: list[Party]) -> None:
    one, two, three = parties
    assert one.lock("a", WRITE, 0, 9) == two.lock("b", WRITE, 0, 9) == three.lock("a", WRITE, 10, 19) == 0
    assert one.waits("b")
    assert two.waits("a", WRITE, 10, 19), "three is in the way, and waits for nothing"
    assert three.lock("a", UNLOCK, 0, 99) == 0
    assert two.outcome() == (two.owner, 0)
    assert one.is_waiting()


def test_no_deadlock_after_a_wait_was_cancelled(parties: list[Party]) -> None:
    one, two, _ = parties
    assert one.lock("a") == two.lock("b") == 0
    assert one.waits("b")
    one.session.event().send("CANCEL", tag=one.owner)
    assert one.outcome() == (one.owner, errno.EINTR)
    assert two.waits("a")


def test_a_chain_is_no_circle(parties: list[Party]) -> None:
    one, two, three = parties
    assert one.lock("a") == two.lock("b") == 0
    assert two.waits("a") and three.waits("b")
    assert one.lock("a", UNLOCK) == 0
    assert two.outcome() == (two.owner, 0)
    assert two.lock("b", UNLOCK) == 0
    assert three.outcome() == (three.owner, 0)


def test_flock_knows_no_deadlock(parties: list[Party]) -> None:
    """As flock(2) says."""
    one, two, _ = parties
    for party, name in ((one, "a"), (two, "b")):
        assert party.files[name].lock(WRITE, flags=FLOCK) == 0
    for party, name in ((one, "b"), (two, "a")):
        party.files[name].wait(WRITE, party.owner, flags=FLOCK, owner=party.owner)
        assert party.is_waiting()


def test_asking_again_over_a_fresh_channel_is_no_deadlock(parties: list[Party]) -> None:
    one, two, _ = parties
    assert one.lock("a") == 0
    assert two.waits("a")
    two.session.lose_event()
    assert two.waits("a")
    assert one.lock("a", UNLOCK) == 0
    assert two.outcome() == (two.owner, 0)
    assert two.is_waiting(), "no second answer"


# ---- order


def test_waits_are_granted_in_the_order_of_their_coming(parties: list[Party]) -> None:
    one, two, three = parties
    assert one.lock("a") == 0
    waiting = [(two, 102), (three, 103), (two, 104), (three, 105)]
    for party, owner in waiting:
        party.files["a"].wait(WRITE, owner, owner=owner)
        assert party.is_waiting()
    assert one.lock("a", UNLOCK) == 0
    for party, owner in waiting:
        assert party.outcome() == (owner, 0)
        assert party.files["a"].lock(UNLOCK, owner=owner) == 0


def test_who_gives_a_lock_back_does_not_get_it_before_who_waits(parties: list[Party]) -> None:
    one, two, _ = parties
    assert one.lock("a") == 0
    assert two.waits("a")
    assert one.lock("a", UNLOCK) == 0
    assert one.lock("a") == errno.EAGAIN
    assert two.outcome() == (two.owner, 0)


def test_readers_are_granted_together_and_a_writer_in_between_waits(parties: list[Party]) -> None:
    """Nobody waits for a lock that is merely asked for: a lock that is free is granted."""
    one, two, three = parties
    assert one.lock("a") == 0
    for owner, kind in ((101, READ), (102, WRITE), (103, READ)):
        two.files["a"].wait(kind, owner, owner=owner)
        assert two.is_waiting()
    assert one.lock("a", UNLOCK) == 0
    assert [two.outcome(), two.outcome()] == [(101, 0), (103, 0)]
    assert three.lock("a", READ) == 0
    for owner in (101, 103):
        assert two.files["a"].lock(UNLOCK, owner=owner) == 0
    assert two.is_waiting()
    assert three.lock("a", UNLOCK) == 0
    assert two.outcome() == (102, 0)


def test_what_a_grant_gives_back_is_granted_too(parties: list[Party]) -> None:
    """Two waits to read a range of which it holds a part for writing: that part is free for readers then."""
    one, two, three = parties
    assert one.lock("a", WRITE, 10, 19) == two.lock("a", WRITE, 0, 9) == 0
    assert three.waits("a", READ, 0, 5)
    two.wait("a", READ, 0, 19)
    assert one.lock("a", UNLOCK, 10, 19) == 0
    parties_that_wait = {id(p.session): p for p in (two, three)}
    got = {p.outcome() for p in parties_that_wait.values()}
    if len(parties_that_wait) == 1:
        got.add(two.outcome())
    assert got == {(two.owner, 0), (three.owner, 0)}


def test_a_wait_behind_a_local_process_is_served_before_who_comes_later(parties: list[Party], share: Path) -> None:
    one, two, _ = parties
    with (share / "a").open("r+b") as local:
        fcntl.lockf(local, fcntl.LOCK_EX)
        assert one.waits("a")
        fcntl.lockf(local, fcntl.LOCK_UN)
        assert two.lock("a") == errno.EAGAIN
        assert one.outcome() == (one.owner, 0)


# ---- ends


def test_what_is_left_of_a_handles_locks_goes_with_it(parties: list[Party]) -> None:
    """F_OFD_SETLK: the open file is the owner, and only RELEASE tells of its end."""
    one, two, _ = parties
    assert one.lock("a") == 0
    other = Opened(one.session, "a")
    assert other.lock(WRITE, 20, 29, owner=77) == 0
    assert two.waits("a", WRITE, 0, 99)
    one.session.release(one.files["a"].handle)
    assert two.is_waiting()
    one.session.release(other.handle)
    assert two.outcome() == (two.owner, 0)


def test_a_wait_outlives_the_close_of_another_descriptor(parties: list[Party]) -> None:
    """As on a local file: close(2) ends locks that are held, in one thread; another goes on waiting."""
    one, two, _ = parties
    assert one.lock("a") == two.lock("a", WRITE, 20, 29) == 0
    assert two.waits("a")
    two.session.flush(two.files["a"].handle, two.owner)
    assert one.lock("a", WRITE, 20, 29) == 0
    assert two.is_waiting()
    assert one.lock("a", UNLOCK) == 0
    assert two.outcome() == (two.owner, 0)


def test_an_owner_is_the_same_by_whatever_name(engine: EngineProcess, share: Path, session: Session) -> None:
    (share / "file").touch()
    (share / "again").hardlink_to(share / "file")
    one, two = Opened(session), Opened(session, "again")
    assert one.lock(WRITE) == two.lock(WRITE) == 0
    two.session.flush(two.handle, 1)
    assert one.lock(WRITE, owner=2) == 0


def test_nothing_is_kept_of_those_who_are_gone(engine: EngineProcess, share: Path) -> None:
    (share / "file").touch()
    before = engine.descriptors()
    with Session(engine.address, share) as session:
        opened = Opened(session)
        for owner in range(1, 200):
            assert opened.lock(READ, owner, owner, owner=owner) == 0
        assert engine.descriptors() >= before + 199
        for owner in range(1, 100):
            assert opened.lock(UNLOCK, owner=owner) == 0
        assert engine.descriptors() < before + 120
    wait_until(lambda: engine.descriptors() == before, "the engine to close everything")


# ---- all at once


def _storm(engine: EngineProcess, share: Path, seed: int) -> None:
    """One session's random locks, waits, cancellations and lost channels; it ends with waits still there."""
    chance = random.Random(seed)
    with Session(engine.address, share) as session:
        party = Party(session, 1)
        for tag in range(1, 300):
            file, owner = party.files[chance.choice(FILES)], chance.randrange(4)
            start = chance.randrange(8)
            span = (start, start + chance.randrange(4))
            flags = chance.choice([0, 0, 0, FLOCK])
            match chance.randrange(8):
                case 0 | 1:
                    file.wait(chance.choice([READ, WRITE]), tag, *span, owner=owner, flags=flags)
                case 2 | 3:
                    file.lock(chance.choice([READ, WRITE]), *span, owner=owner, flags=flags)
                case 4 | 5:
                    file.lock(UNLOCK, *span, owner=owner, flags=flags)
                case 6:
                    session.flush(file.handle, owner)
                    session.event().send("CANCEL", tag=chance.randrange(1, tag + 1))
                case 7 if tag % 10 == 0:
                    session.lose_event()


def test_a_storm_leaves_nothing(engine: EngineProcess, share: Path) -> None:
    """No answer is missed by those who still wait then, no lock stays; the fixture looks for what is left."""
    for name in FILES:
        (share / name).touch()
    with ThreadPoolExecutor(6) as pool:
        for storm in [pool.submit(_storm, engine, share, seed) for seed in range(24)]:
            storm.result(60)
    wait_until(engine.is_idle, "the engine to let everything go")
    for name in FILES:
        with (share / name).open("r+b") as local:
            fcntl.lockf(local, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(local, fcntl.LOCK_EX | fcntl.LOCK_NB)
