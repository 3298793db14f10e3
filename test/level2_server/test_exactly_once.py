"""A request takes effect once, however often its connection breaks and it is sent again."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import wire
from harness.engine_process import EngineProcess
from harness.session import Session, attach_stream, is_closed_by_peer, receive_exactly
from harness.waiting import wait_until
from harness.wire import HEADER_BYTES, ROOT

from qtfs_common.protocol import OPERATIONS

WRITE_FLAGS = os.O_WRONLY | os.O_APPEND


@pytest.fixture
def session(engine: EngineProcess, share: Path) -> Iterator[Session]:
    """Slot 0 is the test's means to look; slot 1 is what breaks."""
    with Session(engine.address, share, slots=8) as opened:
        yield opened


def request(session: Session, op: str, body: bytes, sequence: int, node: int = ROOT, tag: int = 9) -> bytes:
    whole = wire.caller(node, session.who) + body
    return wire.message(OPERATIONS[op], whole, slot=1, sequence=sequence, tag=tag)


def receive(sock: socket.socket) -> bytes:
    """One whole message."""
    data = receive_exactly(sock, HEADER_BYTES)
    assert len(data) == HEADER_BYTES, "the connection was closed"
    return data + receive_exactly(sock, wire.read_header(data)[0] - HEADER_BYTES)


def exchange(session: Session, message: bytes) -> bytes:
    with attach_stream(session.address, session.ticket, 1) as sock:
        sock.sendall(message)
        return receive(sock)


def last_sequence(session: Session) -> int:
    connection, last = session.engine.attach(session.ticket, 1)
    connection.close()
    return last


# ---- each operation that must not run twice


def prepare(share: Path) -> None:
    (share / "old").write_text("old")
    (share / "empty").mkdir()
    (share / "gone").touch()
    os.setxattr(share / "old", "user.x", b"1")


#: Operation: its body, and what the directory must be like afterwards.
ONCE: dict[str, bytes] = {
    "MKDIR": struct.pack("<II", 0o755, 0) + b"made",
    "MKNOD": struct.pack("<II", stat.S_IFREG | 0o644, 0) + b"made",
    "SYMLINK": struct.pack("<II", 4, 1) + b"madet",
    "UNLINK": b"gone",
    "RMDIR": b"empty",
    "RENAME": struct.pack("<QIIII", ROOT, 0, 3, 3, 0) + b"old" + b"new",
    "RENAME exchange": struct.pack("<QIIII", ROOT, 2, 3, 4, 0) + b"old" + b"gone",
    "CREATE": struct.pack("<IIII", os.O_RDWR | os.O_EXCL, 0o644, 0, 0) + b"made",
    "TMPFILE": struct.pack("<IIII", os.O_RDWR, 0o644, 0, 0),
    "OPENDIR": struct.pack("<II", 0, 0),
    "LOOKUP": b"old",
}


@pytest.mark.parametrize("name", ONCE)
def test_a_repetition_gets_the_same_reply_and_has_no_effect(
    session: Session, engine: EngineProcess, share: Path, name: str
) -> None:
    prepare(share)
    message = request(session, name.split()[0], ONCE[name], 1)
    first = exchange(session, message)
    assert wire.read_header(first)[3] == 0, "it succeeded"
    after = {path.name: path.lstat() for path in share.iterdir()}
    held = [{key: s[key] for key in ("nodes", "handles")} for s in engine.figures()["sessions"]]
    for _ in range(3):
        assert exchange(session, message) == first
    assert {path.name: path.lstat() for path in share.iterdir()} == after
    assert [{key: s[key] for key in ("nodes", "handles")} for s in engine.figures()["sessions"]] == held


def test_errors_are_repeated_too(session: Session, share: Path) -> None:
    message = request(session, "RMDIR", b"x", 1)
    first = exchange(session, message)
    assert wire.read_header(first)[3] == 2
    (share / "x").mkdir()
    assert exchange(session, message) == first
    assert (share / "x").is_dir()


def test_what_only_reads_is_read_again(session: Session, share: Path) -> None:
    message = request(session, "GETATTR", struct.pack("<QII", 0, 0, 0), 1)
    first = exchange(session, message)
    share.chmod(0o711)
    again = exchange(session, message)
    assert wire.attributes(first, 48).mode == stat.S_IFDIR | 0o755
    assert wire.attributes(again, 48).mode == stat.S_IFDIR | 0o711


def test_a_repeated_listing_counts_its_lookups_once(session: Session, engine: EngineProcess, share: Path) -> None:
    """Those of the last reply: what has gone meanwhile is forgotten, what has come is counted."""
    for number in range(20):
        (share / str(number)).touch()
    handle = session.opendir(ROOT)
    message = request(session, "READDIR", struct.pack("<QQII", handle, 0, 65536, 1), 1)
    first = list(wire.dirents(exchange(session, message)[HEADER_BYTES:], True))
    assert sum(d.entry is not None for d in first) == 20
    for number in range(5):
        (share / str(number)).unlink()
    (share / "new").touch()
    again = list(wire.dirents(exchange(session, message)[HEADER_BYTES:], True))
    entries = [d.entry for d in again if d.entry is not None]
    assert len(entries) == 16
    assert engine.figures()["sessions"][0]["lookups"] == 1 + 16
    session.forget(*((entry.node, 1) for entry in entries))
    figures = engine.figures()["sessions"][0]
    assert (figures["nodes"], figures["lookups"]) == (1, 1)
    session.release(handle, op="RELEASEDIR")


def test_a_listing_counts_as_many_lookups_as_can_be_taken_back(session: Session, share: Path) -> None:
    """However much would fit."""
    names = {b"%d" % number for number in range(1000)}
    for name in names:
        (share / os.fsdecode(name)).touch()
    handle = session.opendir(ROOT)
    counts, found, offset = [], [], 0

    def read_on() -> list[wire.Dirent]:
        body = struct.pack("<QQII", handle, offset, 1 << 20, 1)
        return list(wire.dirents(session.ask("READDIR", body).body, True))

    while listed := read_on():
        counts.append(sum(d.entry is not None for d in listed))
        found += [d.name for d in listed]
        offset = listed[-1].offset
    assert max(counts) == 256 and sum(counts) == len(names)
    assert len(found) == len(names) + 2 and set(found) == names | {b".", b".."}
    session.release(handle, op="RELEASEDIR")


def test_appends_happen_once_over_many_cuts(session: Session, share: Path) -> None:
    """A writer whose connection breaks after every request loses and doubles nothing."""
    _, opened = session.create(ROOT, b"log", WRITE_FLAGS)
    expected = b""
    for sequence in range(1, 51):
        line = b"line %d\n" % sequence
        expected += line
        body = struct.pack("<QQII", opened.handle, 0, len(line), 0) + line
        message = request(session, "WRITE", body, sequence)
        with attach_stream(session.address, session.ticket, 1) as sock:
            sock.sendall(message)  # closed without waiting: nobody knows whether it was executed
        reply = exchange(session, message)
        assert struct.unpack("<Q", reply[HEADER_BYTES:]) == (len(line),)
        assert last_sequence(session) == sequence
    assert (share / "log").read_bytes() == expected
    session.release(opened.handle)


# ---- cut at every byte


def test_a_request_cut_at_any_byte_is_executed_once(session: Session, share: Path) -> None:
    body = struct.pack("<II", 0o755, 0)
    whole = len(request(session, "MKDIR", body + b"directory-000", 1))
    for cut in range(whole + 1):
        name = b"directory-%03d" % cut
        message = request(session, "MKDIR", body + name, cut + 1)
        with attach_stream(session.address, session.ticket, 1) as sock:
            sock.sendall(message[:cut])
        last = last_sequence(session)
        assert last in ((cut, cut + 1) if cut == whole else (cut,)), "half a request must not count"
        reply = exchange(session, message)
        assert wire.read_header(reply)[3] == 0 and wire.entry(reply, HEADER_BYTES).attr.ino
        assert os.path.isdir(share / name.decode())
    assert len(os.listdir(share)) == whole + 1


@pytest.mark.parametrize("read", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, 100, 159])
def test_a_reply_cut_at_any_byte_comes_again_whole(session: Session, share: Path, read: int) -> None:
    message = request(session, "MKDIR", struct.pack("<II", 0o755, 0) + b"d", 1)
    with attach_stream(session.address, session.ticket, 1) as sock:
        sock.sendall(message)
        begin = receive_exactly(sock, read)
    reply = exchange(session, message)
    assert len(reply) == 160 and reply.startswith(begin)
    assert wire.entry(reply, HEADER_BYTES).attr.ino == (share / "d").stat().st_ino


def test_the_repetition_waits_for_the_first_to_end(session: Session, share: Path) -> None:
    """A long request whose connection was cut still runs: the repetition must get its outcome, not a second run."""
    size = 64 << 20
    with (share / "from").open("wb") as file:
        file.truncate(size)
        for at in range(0, size, 1 << 16):
            os.pwrite(file.fileno(), b"x", at)
    source = session.open(session.lookup(ROOT, b"from").node).handle
    target = session.create(ROOT, b"to", os.O_WRONLY)[1].handle
    body = struct.pack("<QQQQQII", source, 0, target, 0, size, 0, 0)
    message = request(session, "COPY_FILE_RANGE", body, 1)
    with attach_stream(session.address, session.ticket, 1) as sock:
        sock.sendall(message)
    # No look at last_sequence first: joining again at once is the hardest case.
    reply = exchange(session, message)
    assert struct.unpack("<Q", reply[HEADER_BYTES:]) == (size,)
    assert wire.read_header(exchange(session, message))[3] == 0
    assert (share / "to").stat().st_size == size
    session.release(source)
    session.release(target)


# ---- numbering


@pytest.mark.parametrize("sequence", [0, 2, 3, 1 << 32, (1 << 64) - 1])
def test_a_number_that_is_neither_the_last_nor_the_next_breaks_the_protocol(
    session: Session, engine: EngineProcess, share: Path, sequence: int
) -> None:
    malformed = engine.figures()["malformed"]
    with attach_stream(session.address, session.ticket, 1) as sock:
        sock.sendall(request(session, "MKDIR", struct.pack("<II", 0o755, 0) + b"d", sequence))
        assert is_closed_by_peer(sock)
    wait_until(lambda: engine.figures()["malformed"] == malformed + 1, "the breach to be counted")
    assert os.listdir(share) == [] and last_sequence(session) == 0


def test_an_old_number_is_not_answered_once_a_newer_came(session: Session, share: Path) -> None:
    messages = [
        request(session, "MKDIR", struct.pack("<II", 0o755, 0) + b"%d" % number, number) for number in (1, 2, 3)
    ]
    for message in messages:
        exchange(session, message)
    with attach_stream(session.address, session.ticket, 1) as sock:
        sock.sendall(messages[1])
        assert is_closed_by_peer(sock)
    assert sorted(os.listdir(share)) == ["1", "2", "3"]


def test_slots_number_by_themselves(session: Session, share: Path) -> None:
    """Eight threads, a slot each, whose connections break now and then: 400 directories, each made once."""
    failures: list[object] = []

    def work(index: int) -> None:
        for number in range(50):
            try:
                if number % 7 == index % 7:
                    session.reattach(index)
                session.mkdir(ROOT, b"%d-%d" % (index, number), slot=index)
            except OSError as error:
                failures.append((index, number, error))

    for index in range(8):
        session.slot(index)
    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and len(os.listdir(share)) == 400


def test_requests_sent_before_the_reply_are_answered_in_order(session: Session, share: Path) -> None:
    """A client may not do so, yet what it sends in one go must not be lost or mixed up."""
    with attach_stream(session.address, session.ticket, 1) as sock:
        messages = [
            request(session, "MKDIR", struct.pack("<II", 0o755, 0) + b"%d" % n, n, tag=n * 7) for n in range(1, 101)
        ]
        sock.sendall(b"".join(messages))
        headers = [wire.read_header(receive(sock)) for _ in messages]
    assert [(h[3], h[5], h[6]) for h in headers] == [(0, n, n * 7) for n in range(1, 101)]
    assert len(os.listdir(share)) == 100
