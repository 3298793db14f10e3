"""Messages through shared memory, against a whole engine."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from harness import wire
from harness.engine_process import EngineProcess, everything_below
from harness.ring_file import (
    BY_LINK,
    EPOCH,
    FOR_MESSAGES,
    FOR_ROOM,
    HEAD,
    SLEEPING,
    TAIL,
    RingFile,
    bar_path,
)
from harness.session import MAX_PAYLOAD, Session, Slot
from harness.streams import read_body
from harness.waiting import wait_until
from harness.wire import ROOT

from qtfs_client.connection import Engine
from qtfs_common.addresses import parse_address
from qtfs_common.errors import QtfsError
from qtfs_common.protocol import OPERATIONS
from qtfs_common.transport import Connection

#: What two messages of the longest kind take, and no more: messages wrap all the time.
TIGHT = "channels=3,request=144K,reply=144K"


@pytest.fixture
def tight(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine with three of the smallest channels."""
    with EngineProcess(tmp_path / "tight", "shm", arguments=("--bar-layout", TIGHT)).running() as engine:
        yield engine


@pytest.fixture
def own(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine for this test alone."""
    with EngineProcess(tmp_path / "engine", "shm").running() as engine:
        yield engine


# ---- messages of all sizes


def echo(session: Session, handle: int, sizes: list[int], data: bytes) -> None:
    """Write and read so many bytes again and again; what comes back is what went."""
    for number, size in enumerate(sizes):
        begin = number % 61
        sent = data[begin : begin + size]
        assert session.write(handle, 0, sent) == len(sent)
        assert session.read(handle, 0, size) == sent, f"message {number}, {size} bytes"


@pytest.mark.parametrize("seed", range(3))
def test_sizes_in_random_order(own: EngineProcess, seed: int) -> None:
    draw = random.Random(seed)
    limits = (200, 20_000, 70_000, MAX_PAYLOAD)
    sizes = [draw.choice((draw.randrange(draw.choice(limits) + 1), MAX_PAYLOAD)) for _ in range(400)]
    with Session(own.address, own.share) as session:
        echo(session, session.create(ROOT, b"f")[1].handle, sizes, draw.randbytes(MAX_PAYLOAD + 61))


def test_every_size_where_only_two_messages_fit(tight: EngineProcess) -> None:
    draw = random.Random(4)
    sizes = [*range(0, 300), *range(16_200, 16_500, 7), *range(65_200, 65_537, 5)] * 2
    draw.shuffle(sizes)
    with Session(tight.address, tight.share) as session:
        payload = session.ticket.max_payload
        assert payload == 65_536
        echo(session, session.create(ROOT, b"f")[1].handle, sizes, draw.randbytes(payload + 61))


# ---- a device that has more than the area takes

PAST_THE_AREA = 200_000


@pytest.fixture
def random_device(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine that listens at a socket, and at memory with the smallest channels; it shares the device `random`."""
    area = tmp_path / "engine"
    rules = {kind: [area / "share", area / "share/random"] for kind in everything_below("/")}
    arguments = ("--listen", f"shm://{area}/engine.bar", "--bar-layout", TIGHT)
    with EngineProcess(area, "unix", rules=rules, arguments=arguments).running() as engine:
        os.mknod(engine.share / "random", stat.S_IFCHR | 0o666, os.makedev(1, 9))
        yield engine


@contextlib.contextmanager
def untouched(engine: EngineProcess) -> Iterator[None]:
    """The body uses one channel; the areas of the others stay as they are."""
    with RingFile(engine.area / "engine.bar") as ring:
        yield
        (used,) = ring.served()
        for channel in {0, 1, 2} - {used}:
            begin = ring.request_area(channel)
            assert not any(ring.map[begin : begin + 2 * (144 << 10)]), f"channel {channel}"


@pytest.mark.root
@pytest.mark.parametrize("size", [PAST_THE_AREA, MAX_PAYLOAD])
def test_a_device_is_not_read_past_the_reply_area(random_device: EngineProcess, size: int) -> None:
    with (
        Session(f"shm://{random_device.area}/engine.bar", random_device.share) as session,
        untouched(random_device),
    ):
        handle = session.open(session.lookup(ROOT, b"random").node).handle
        assert session.ask("READ", read_body(handle, size)).error == errno.EMSGSIZE
        assert len(session.read(handle, 0, session.ticket.max_payload)) == session.ticket.max_payload


@pytest.mark.root
def test_a_kept_reply_is_not_written_past_the_reply_area(random_device: EngineProcess) -> None:
    """It was kept when the slot's connection was a socket, which takes longer ones. Our client would mount again."""
    with Session(random_device.address, random_device.share) as session:
        handle = session.open(session.lookup(ROOT, b"random").node).handle
        request = session.slot(1).send("READ", wire.caller(ROOT) + read_body(handle, PAST_THE_AREA))
        assert len(session.slot(1).receive().body) == PAST_THE_AREA
        session.slots.pop(1).connection.close()
        smaller = Engine(parse_address(f"shm://{random_device.area}/engine.bar"), None, REPLY_S)
        with untouched(random_device):
            connection, last = smaller.attach(replace(session.ticket, max_payload=65_536), 1)
            session.slots[1] = Slot(1, connection, last)
            connection.send(request)
            reply = session.slot(1).receive()
            assert (reply.op, reply.error, reply.sequence) == (OPERATIONS["READ"], errno.EIO, last)
            assert len(session.read(handle, 0, 1000, slot=1)) == 1000


# ---- a peer that writes nonsense into the memory


@dataclass
class Pair:
    """Two sessions of one engine: the test spoils the attacker's channel, and the victim must not notice."""

    engine: EngineProcess
    ring: RingFile
    attacker: Session
    channel: int
    victim: Session

    def connection(self) -> Connection:
        return self.attacker.slot().connection

    def ring_the_bell(self) -> None:
        """Make the engine look, if it still listens."""
        with contextlib.suppress(OSError):
            os.write(self.connection().fileno(), b"\0")

    def malformed(self) -> int:
        count = self.engine.figures()["malformed"]
        assert isinstance(count, int)
        return count

    def fails(self) -> int:
        """The errno that the attacker's connection ends with."""
        try:
            self.connection().receive(REPLY_S)
        except OSError as error:
            return error.errno or 0
        raise AssertionError("it did not end")

    def check(self) -> None:
        """The victim is served, and so is the attacker by a new channel."""
        assert self.victim.getattr(ROOT).nlink >= 2
        self.attacker.reattach()
        assert self.attacker.getattr(ROOT).nlink >= 2
        # The spoilt one is free again.
        wait_until(lambda: len(self.ring.served()) == 2, "the engine to let go of the channel")


REPLY_S = 10.0
WORDS = (EPOCH, TAIL, HEAD, SLEEPING)
ENDED = (errno.ECONNRESET, errno.EPROTO)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """One engine for all who spoil their channels."""
    arguments = ("--bar-layout", "channels=4")
    with EngineProcess(tmp_path_factory.mktemp("target"), "shm", arguments=arguments).running() as engine:
        yield engine


@pytest.fixture
def pair(target: EngineProcess) -> Iterator[Pair]:
    with RingFile(bar_path(target)) as ring:
        wait_until(lambda: target.is_idle() and not ring.served(), "the engine to be idle")
        with Session(target.address, target.share) as victim:
            (first,) = ring.served()
            with Session(target.address, target.share) as attacker:
                (channel,) = set(ring.served()) - {first}
                attacker.getattr(ROOT)
                # What is written while a worker still looks is seen at once; the tests mean it to be seen as a whole.
                asleep = ring.engine_line(channel) + SLEEPING
                wait_until(lambda: ring.get(asleep, 4) & FOR_MESSAGES, "the engine to sleep on the channel")
                yield Pair(target, ring, attacker, channel, victim)
    wait_until(target.is_idle, f"the engine to let everything go; it has {target.figures()}")


def far_positions(area: int) -> list[int]:
    """Positions that no honest side comes to, as distances from where it stands."""
    return [1, 32, 63, -64, -1, area + 64, 1 << 31, 1 << 32, 1 << 63]


@pytest.mark.parametrize("distance", far_positions(2_113_536))
def test_a_client_claims_to_have_written_nonsense(pair: Pair, distance: int) -> None:
    before = pair.malformed()
    at = pair.ring.client_line(pair.channel) + TAIL
    pair.ring.set(at, (pair.ring.get(at) + distance) % (1 << 64))
    pair.ring_the_bell()
    assert pair.fails() in ENDED
    wait_until(lambda: pair.malformed() == before + 1, "the engine to count it")
    pair.check()


@pytest.mark.parametrize("distance", far_positions(2_113_536))
def test_an_engine_claims_to_have_written_nonsense(pair: Pair, distance: int) -> None:
    at = pair.ring.engine_line(pair.channel) + TAIL
    pair.ring.set(at, (pair.ring.get(at) + distance) % (1 << 64))
    assert pair.fails() == errno.EPROTO
    pair.check()


LENGTHS = [0, 1, 31, 65, 4096, 1_056_769, 1 << 31, (1 << 32) - 1]


def put_message(ring: RingFile, line: int, area: int, head: bytes) -> None:
    """A message at the tail of a line, 64 bytes of it."""
    tail = ring.get(line + TAIL)
    ring.map[area + tail : area + tail + len(head)] = head
    ring.set(line + TAIL, tail + 64)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_request_of_a_nonsense_length(pair: Pair, length: int) -> None:
    before = pair.malformed()
    ring = pair.ring
    head = wire.header(length, OPERATIONS["GETATTR"], sequence=2)
    put_message(ring, ring.client_line(pair.channel), ring.request_area(pair.channel), head)
    pair.ring_the_bell()
    assert pair.fails() in ENDED
    wait_until(lambda: pair.malformed() == before + 1, "the engine to count it")
    pair.check()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_reply_of_a_nonsense_length(pair: Pair, length: int) -> None:
    ring = pair.ring
    head = wire.header(length, OPERATIONS["GETATTR"], 1, sequence=2)
    put_message(ring, ring.engine_line(pair.channel), ring.reply_area(pair.channel), head)
    assert pair.fails() == errno.EPROTO
    pair.check()


@pytest.mark.parametrize("side", ["client", "engine"])
@pytest.mark.parametrize("epoch", [0, 1, (1 << 64) - 1])
def test_a_claim_that_becomes_another(pair: Pair, side: str, epoch: int) -> None:
    """It is no nonsense: the peer is gone."""
    before = pair.malformed()
    ring = pair.ring
    ring.set((ring.client_line if side == "client" else ring.engine_line)(pair.channel) + EPOCH, epoch)
    pair.ring_the_bell()
    assert pair.fails() == errno.ECONNRESET
    pair.check()
    assert pair.malformed() == before


@pytest.mark.parametrize("distance", far_positions(2_113_536))
def test_nonsense_about_what_was_read_gives_no_room(pair: Pair, distance: int) -> None:
    """Neither side believes it; both write it anew when they read."""
    for line in (pair.ring.client_line(pair.channel), pair.ring.engine_line(pair.channel)):
        pair.ring.set(line + HEAD, (pair.ring.get(line + HEAD) + distance) % (1 << 64))
        for _ in range(20):
            pair.attacker.getattr(ROOT)
    pair.check()


@pytest.mark.parametrize("value", [0xFFFFFFFF, FOR_MESSAGES | FOR_ROOM, BY_LINK])
def test_nonsense_about_who_sleeps_costs_a_ring_at_most(pair: Pair, value: int) -> None:
    for _ in range(20):
        pair.ring.set(pair.ring.client_line(pair.channel) + SLEEPING, value, 4)
        pair.attacker.getattr(ROOT)
    pair.check()


def test_a_channel_whose_every_word_changes_all_the_time(pair: Pair) -> None:
    """Whatever the peer writes at whatever moment ends its own channel at most."""
    draw = random.Random(6)
    ring, stopping = pair.ring, threading.Event()
    (victims,) = set(ring.served()) - {pair.channel}

    def spoil() -> None:
        while not stopping.is_set():
            channel = draw.choice([number for number in range(ring.channels) if number != victims])
            if draw.random() < 0.5:
                word = draw.choice((ring.client_line, ring.engine_line))(channel) + draw.choice(WORDS)
                value = draw.choice((0, draw.randrange(1 << 64), ring.get(word) + draw.randrange(-256, 256)))
                ring.set(word, value % (1 << 64))
            else:
                area = draw.choice((ring.request_area, ring.reply_area))(channel)
                ring.set(area + draw.randrange(0, 4096, 4), draw.randrange(1 << 32), 4)
            time.sleep(draw.random() / 2000)

    thread = threading.Thread(target=spoil)
    thread.start()
    ends = 0
    until = time.monotonic() + 3
    try:
        while time.monotonic() < until or ends < 20:
            assert time.monotonic() < until + 20, f"{ends} connections ended"
            assert pair.victim.getattr(ROOT).nlink >= 2
            ends += not chats(pair)
    finally:
        stopping.set()
        thread.join()
    assert pair.engine.exit_status() is None
    pair.connection().close()
    wait_until(lambda: ring.served() == [victims], "every channel to be free again but one")
    pair.attacker.slots.clear()
    assert pair.attacker.getattr(ROOT).nlink >= 2


def chats(pair: Pair) -> bool:
    """A few PINGs over the attacker's channel; False and a new connection if that breaks."""
    try:
        for _ in range(20):
            pair.connection().send(wire.message(OPERATIONS["PING"]), 0.2)
            pair.connection().receive(0.2)
    except OSError:
        pair.connection().close()
        with contextlib.suppress(QtfsError):  # the handshake breaks too
            pair.attacker.slots[0] = Slot(0, pair.attacker.engine.with_timeout(0.5).connect())
        return False
    return True
