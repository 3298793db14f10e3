"""Two mounts of one directory, and local processes of the server: what each sees of the others, and locks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness.waiting import wait_until
from programs import Shared, Worker, all_at_once, over, worker

KINDS = ("flock", "lockf")


@pytest.fixture
def places(shared: Shared, again: Shared) -> list[Path]:
    """Two clients and the server."""
    return [shared.here, again.here, shared.there]


# ------------------------------------------------------------------------------------------------------- what is seen


@over("unix-auto", "unix-none", "tcp-auto")
def test_close_to_open(places: list[Path]) -> None:
    """Who opens a file sees what others wrote and closed before, be it as long as before and a moment later."""
    for number in range(60):
        content = b"%06d" % number * (1 + number // 20 * 3000)
        (places[number % 3] / "file").write_bytes(content)
        for reader in places:
            assert (reader / "file").read_bytes() == content
            assert (reader / "file").stat().st_size == len(content)


def test_names_are_believed_for_a_second(places: list[Path]) -> None:
    """What is new is seen at once, what went or was replaced within a second."""

    def texts() -> set[str]:
        return {(reader / f"file-{number}").read_text() for reader in places for number in range(3)}

    def none_exists() -> bool:
        return not any((reader / f"file-{number}").exists() for reader in places for number in range(3))

    for number, place in enumerate(places):
        (place / f"file-{number}").write_text("first")
    assert texts() == {"first"}
    for number, place in enumerate(places):
        (place / "new").write_text("second")
        os.rename(place / "new", place / f"file-{number}")
    wait_until(lambda: texts() == {"second"}, "the new files to be seen", 3)
    for number, place in enumerate(places):
        (place / f"file-{number}").unlink()
        assert all(f"file-{number}" not in os.listdir(reader) for reader in places)
    wait_until(none_exists, "the files to be gone", 3)


@over("unix-none", "tcp-none")
def test_without_caches_everything_is_seen_at_once(places: list[Path]) -> None:
    """Through descriptors that are open, too."""
    for number, place in enumerate(places):
        name = f"file-{number}"
        (place / name).write_text("first")
        with ExitStack() as stack:
            files = [stack.enter_context((p / name).open("rb", buffering=0)) for p in places]
            with (place / name).open("r+b", buffering=0) as writing:
                writing.write(b"second")
                assert all(os.pread(file.fileno(), 100, 0) == b"second" for file in files)
                writing.truncate(3)
                assert all(os.fstat(file.fileno()).st_size == 3 for file in files)
            (place / "new").write_text("new")
            os.rename(place / "new", place / name)
            assert all((p / name).read_text() == "new" for p in places)
            assert all(os.pread(file.fileno(), 100, 0) == b"sec" for file in files)
            assert all(os.fstat(file.fileno()).st_nlink == 0 for file in files)


def test_a_file_that_another_client_removed(places: list[Path]) -> None:
    """Stays usable for who has it open."""
    (places[0] / "file").write_text("content")
    with worker("hold", places[0] / "file") as holder:
        (places[1] / "file").unlink()
        assert os.listdir(places[2]) == []
        assert holder.finish() == "content\n"


@over("unix-auto", "unix-none", "tcp-auto")
def test_exclusive_creation_has_one_winner(places: list[Path]) -> None:
    names = 200
    said = all_at_once(*(("create", place, names) for place in [*places, *places[:2]]))
    winners = [name for line in said for name in line.split()]
    assert sorted(map(int, winners)) == list(range(names))
    assert sorted(map(int, os.listdir(places[2]))) == list(range(names))


# ------------------------------------------------------------------------------------------------------------- locks


@pytest.fixture
def files(places: list[Path]) -> list[Path]:
    (places[0] / "locked").touch()
    return [place / "locked" for place in places]


def asks(tester: Worker) -> str:
    tester.say("try")
    return tester.hear()


def until_it_waits(process: Worker) -> None:
    """Until it sleeps within the system call that asks for the lock."""
    wchan = Path(f"/proc/{process.process.pid}/wchan")
    wait_until(lambda: "pipe" not in (now := wchan.read_text()) and now != "0", "the process to wait for the lock")


@pytest.mark.parametrize("kind", KINDS)
@over("unix-auto", "unix-none", "tcp-auto")
def test_a_lock_holds_everywhere(files: list[Path], kind: str) -> None:
    for holding in files:
        with ExitStack() as stack:
            holder = stack.enter_context(worker("lock", holding, kind))
            testers = [stack.enter_context(worker("try_lock", file, kind)) for file in [*files, holding]]
            assert [asks(tester) for tester in testers] == ["free"] * 4
            holder.say()
            assert holder.hear() == "locked"
            assert [asks(tester) for tester in testers] == ["taken"] * 4
            holder.say()
            assert holder.hear() == "unlocked"
            assert [asks(tester) for tester in testers] == ["free"] * 4


@pytest.mark.parametrize("end", ["unlock", "kill"])
@pytest.mark.parametrize("kind", KINDS)
@over("unix-auto", "tcp-none")
def test_who_waits_gets_it(files: list[Path], kind: str, end: str) -> None:
    """From a holder that unlocks, or is killed; whichever side either is on. Nobody gets it while it is held."""
    for holding, waiting in ((0, 1), (0, 0), (0, 2), (2, 0)):
        with worker("lock", files[holding], kind) as holder, worker("lock", files[waiting], kind) as waiter:
            holder.say()
            assert holder.hear() == "locked"
            waiter.say()
            until_it_waits(waiter)
            if end == "kill":
                holder.kill()
            else:
                holder.say()
                assert holder.hear() == "unlocked"
            assert waiter.hear() == "locked"


@pytest.mark.parametrize("kind", KINDS)
def test_who_waits_can_be_killed(files: list[Path], kind: str) -> None:
    """And does not get the lock after its death."""
    with worker("lock", files[0], kind) as holder, worker("lock", files[1], kind) as waiter:
        holder.say()
        assert holder.hear() == "locked"
        waiter.say()
        until_it_waits(waiter)
        waiter.kill()
        holder.say()
        assert holder.hear() == "unlocked"
        with worker("try_lock", files[2], kind) as tester:
            assert asks(tester) == "free"


@pytest.mark.parametrize("kind", KINDS)
@over("unix-auto", "tcp-auto")
def test_a_chain_of_killed_holders(files: list[Path], kind: str) -> None:
    """Each gets the lock when the one before it is killed, whose last close must not get lost."""
    with ExitStack() as stack:
        holder = stack.enter_context(worker("lock", files[0], kind))
        holder.say()
        assert holder.hear() == "locked"
        for number in range(20):
            waiter = stack.enter_context(worker("lock", files[number % 2], kind))
            waiter.say()
            until_it_waits(waiter)
            holder.kill()
            assert waiter.hear() == "locked", f"after {number} deaths"
            holder = waiter


@pytest.mark.parametrize("kind", KINDS)
@over("unix-none", "tcp-none")
def test_counting_under_a_lock(files: list[Path], kind: str) -> None:
    """Five processes in three places, and no addition is lost."""
    jobs: Sequence[Path] = [*files, *files[:2]]
    all_at_once(*(("count", file, kind, 50) for file in jobs))
    assert files[2].read_text() == "250"
