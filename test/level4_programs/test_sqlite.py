"""SQLite with two writers at once: nothing is lost, nothing is torn, and the server can read it."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
from programs import Shared, all_at_once, over, worker

TRANSACTIONS = 100
#: Every tenth transaction is rolled back.
ROWS = 3 * (TRANSACTIONS - TRANSACTIONS // 10)


def make(path: Path, mode: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as base:
        assert base.execute(f"PRAGMA journal_mode={mode}").fetchone() == (mode,)
        base.execute("CREATE TABLE entries (who TEXT, number INTEGER, part INTEGER, filler TEXT)")
        base.execute("CREATE INDEX by_number ON entries (who, number)")
        base.execute("CREATE TABLE totals (number INTEGER)")
        base.execute("INSERT INTO totals VALUES (0)")
        base.commit()


def judge(path: Path, writers: int) -> None:
    with contextlib.closing(sqlite3.connect(path)) as base:
        assert base.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert base.execute("SELECT number FROM totals").fetchone() == (writers * ROWS,)
        counts = base.execute("SELECT who, count(*), count(DISTINCT number * 3 + part) FROM entries GROUP BY who")
        assert counts.fetchall() == [(str(who), ROWS, ROWS) for who in range(writers)]


@pytest.mark.parametrize("mode", ["delete", "truncate", "wal"])
@over("unix-auto", "unix-none", "tcp-auto")
def test_two_writers(shared: Shared, mode: str) -> None:
    make(shared.here / "base", mode)
    all_at_once(*(("insert", shared.here / "base", who, TRANSACTIONS) for who in range(2)))
    judge(shared.here / "base", 2)
    judge(shared.there / "base", 2)


@over("unix-none")
def test_writers_on_two_clients_and_on_the_server(shared: Shared, again: Shared) -> None:
    """A rollback journal needs locks and reads that see what others wrote, and no shared memory."""
    make(shared.here / "base", "delete")
    places = [shared.here, again.here, shared.there]
    all_at_once(*(("insert", place / "base", who, TRANSACTIONS) for who, place in enumerate(places)))
    for place in places:
        judge(place / "base", 3)


@pytest.mark.parametrize("mode", ["delete", "wal"])
@over("unix-auto", "unix-none")
def test_a_writer_killed_halfway(shared: Shared, mode: str) -> None:
    """Its locks go with it, what it wrote is rolled back, and others go on."""
    make(shared.here / "base", mode)
    with worker("insert_halfway", shared.here / "base") as writer:
        writer.say()
        assert writer.hear() == "halfway"
        writer.kill()
    all_at_once(("insert", shared.here / "base", 0, TRANSACTIONS))
    judge(shared.here / "base", 1)
    judge(shared.there / "base", 1)
