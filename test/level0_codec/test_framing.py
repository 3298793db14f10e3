"""Messages over a stream socket: whole, in order, however the bytes are cut; malformed headers end the connection."""

from __future__ import annotations

import errno
import itertools
import socket
import threading
from collections.abc import Iterator

import pytest
from harness import wire
from harness.leaks import descriptors
from hypothesis import given
from hypothesis import strategies as st

from qtfs_common.protocol import LIMITS
from qtfs_common.transport import Connection

MAX_MESSAGE = LIMITS["MAX_MESSAGE"]
TIMEOUT_S = 10.0

numbers = st.fixed_dictionaries(
    {
        "op": st.integers(0, 0xFFFF),
        "flags": st.integers(0, 0xFFFF),
        "slot": st.integers(0, 0xFFFFFFFF),
        "sequence": st.integers(0, (1 << 64) - 1),
        "tag": st.integers(0, (1 << 64) - 1),
    }
)
bodies = st.one_of(st.binary(max_size=200), st.integers(0, MAX_MESSAGE - 32).map(bytes))
messages = st.lists(st.tuples(numbers, bodies), min_size=1, max_size=6)


class Pair:
    """A connection and the raw socket at its other end."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        ours.setblocking(False)
        self.peer.settimeout(TIMEOUT_S)
        self.connection = Connection(ours.detach())

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.close()
        self.connection.close()

    def receive(self, timeout_s: float = TIMEOUT_S) -> wire.Reply:
        return wire.Reply._make(self.connection.receive(timeout_s))


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair() as opened:
        yield opened


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    """`data` cut at the given places, taken modulo its length."""
    places = sorted({cut % len(data) for cut in cuts} | {0, len(data)})
    for begin, end in itertools.pairwise(places):
        yield data[begin:end]


def expected(fields: dict[str, int], body: bytes) -> wire.Reply:
    return wire.Reply(fields["op"], fields["flags"], 0, fields["slot"], fields["sequence"], fields["tag"], body)


@given(messages, st.lists(st.integers(0, 1 << 30), max_size=20))
def test_messages_arrive_whole_however_they_are_cut(sent: list[tuple[dict[str, int], bytes]], cuts: list[int]) -> None:
    data = b"".join(wire.message(body=body, **fields) for fields, body in sent)
    with Pair() as pair:

        def send() -> None:
            for piece in pieces(data, cuts):
                pair.peer.sendall(piece)

        sender = threading.Thread(target=send)
        sender.start()
        received = [pair.receive() for _ in sent]
        sender.join()
    assert received == [expected(fields, body) for fields, body in sent]


@given(st.lists(bodies, min_size=1, max_size=4), st.integers(1000, 70000))
def test_messages_leave_whole_however_slowly_they_are_read(sent: list[bytes], at_once: int) -> None:
    data = [wire.message(7, body, tag=index) for index, body in enumerate(sent)]
    arrived = bytearray()
    with Pair() as pair:
        total = sum(map(len, data))

        def read() -> None:
            while len(arrived) < total:
                arrived.extend(pair.peer.recv(at_once))

        reader = threading.Thread(target=read)
        reader.start()
        for each in data:
            pair.connection.send(each, TIMEOUT_S)
        reader.join()
    assert bytes(arrived) == b"".join(data)


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_message_cut_anywhere_is_waited_for(pair: Pair, cut: int) -> None:
    data = wire.message(16, b"12345678", tag=5)
    pair.peer.sendall(data[:cut])
    with pytest.raises(TimeoutError):
        pair.receive(0.0)
    pair.peer.sendall(data[cut:])
    assert pair.receive().body == b"12345678"


@pytest.mark.parametrize("length", [0, 1, 31, MAX_MESSAGE + 1, 1 << 31, (1 << 32) - 1])
def test_a_length_out_of_range_is_malformed_at_once(pair: Pair, length: int) -> None:
    pair.peer.sendall(wire.header(length, 16))
    with pytest.raises(OSError) as caught:
        pair.receive()
    assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize("length", [32, 33, MAX_MESSAGE])
def test_lengths_at_the_limits_are_taken(pair: Pair, length: int) -> None:
    sender = threading.Thread(target=pair.peer.sendall, args=(wire.message(16, bytes(length - 32)),))
    sender.start()
    assert len(pair.receive().body) == length - 32
    sender.join()


@given(st.integers(0, 3), st.binary(min_size=32, max_size=400))
def test_any_bytes_are_messages_or_an_error(good: int, rubbish: bytes) -> None:
    """Whatever comes: messages as long as lengths are right, then EPROTO, or the end of the stream."""
    with Pair() as pair:
        pair.peer.sendall(wire.message(16, b"x") * good + rubbish)
        pair.peer.shutdown(socket.SHUT_WR)
        received = 0
        with pytest.raises(OSError) as caught:
            while True:
                pair.receive()
                received += 1
    assert received >= good
    assert caught.value.errno in (errno.EPROTO, errno.ECONNRESET)


def test_the_end_of_the_stream_inside_a_message_is_a_broken_connection(pair: Pair) -> None:
    pair.peer.sendall(wire.message(16, b"x" * 100)[:-1])
    pair.peer.close()
    with pytest.raises(ConnectionResetError):
        pair.receive()


def test_messages_before_the_end_of_the_stream_are_not_lost(pair: Pair) -> None:
    pair.peer.sendall(wire.message(16, b"a") + wire.message(17, b"b"))
    pair.peer.close()
    assert [pair.receive().body, pair.receive().body] == [b"a", b"b"]
    with pytest.raises(ConnectionResetError):
        pair.receive()


def test_a_message_too_long_to_send_is_refused_and_nothing_of_it_goes_out(pair: Pair) -> None:
    with pytest.raises(OSError) as caught:
        pair.connection.send(bytes(MAX_MESSAGE + (1 << 20)))
    assert caught.value.errno == errno.EMSGSIZE
    pair.connection.send(wire.message(6), TIMEOUT_S)
    assert pair.peer.recv(100) == wire.message(6)


def test_sending_to_a_peer_that_is_gone_is_an_error(pair: Pair) -> None:
    pair.peer.close()
    with pytest.raises(BrokenPipeError):
        pair.connection.send(wire.message(6))


def test_sending_to_a_peer_that_does_not_read_times_out(pair: Pair) -> None:
    with pytest.raises(TimeoutError):
        while True:
            pair.connection.send(wire.message(6, bytes(1 << 20)), 0.01)


def test_closing_gives_the_descriptor_back_once(pair: Pair) -> None:
    fd = pair.connection.fileno()
    pair.connection.close()
    assert fd not in descriptors() and pair.connection.fileno() == -1
    other = socket.socket()
    assert other.fileno() == fd, "the lowest free descriptor"
    pair.connection.close()
    assert fd in descriptors(), "closing twice must not close another's descriptor"
    other.close()


def test_detaching_gives_the_descriptor_away(pair: Pair) -> None:
    fd = pair.connection.detach()
    assert pair.connection.fileno() == -1
    with socket.socket(fileno=fd) as sock:
        sock.sendall(b"still open")
    assert pair.peer.recv(100) == b"still open"
