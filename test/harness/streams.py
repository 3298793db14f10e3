"""Requests on FIFOs, devices and pseudo files: over a slot, and over the event channel, where they may wait."""

from __future__ import annotations

import select
import struct

from harness import wire
from harness.session import Session
from harness.wire import ROOT, Reply, Who

from qtfs_common.protocol import OPERATIONS

STREAM_READER, STREAM_WRITER = 1 << 63, 1 << 63 | 1 << 61
UNCACHED, STREAM = 1, 4
POLLABLE = 2  # bit of a handle
IN, OUT, ERR, HUP = select.POLLIN, select.POLLOUT, select.POLLERR, select.POLLHUP
PING_TAG = 999_999


def open_body(flags: int) -> bytes:
    return struct.pack("<II", flags, 0)


def read_body(handle: int, size: int = 65536, flags: int = 0) -> bytes:
    return struct.pack("<QQII", handle, 0, size, flags)


def write_body(handle: int, data: bytes, flags: int = 0, offset: int = 0) -> bytes:
    return struct.pack("<QQII", handle, offset, len(data), flags) + data


def later(session: Session, op: str, body: bytes, tag: int, node: int = ROOT, who: Who | None = None) -> None:
    """Ask over the event channel."""
    session.event().send(op, wire.caller(node, who or session.who) + body, tag)


def answer(session: Session, op: str, tag: int) -> Reply:
    """The next message of the event channel, which must be that answer."""
    reply = session.event().receive()
    assert (reply.op, reply.tag, reply.flags) == (OPERATIONS[op], tag, 1), reply
    return reply


def is_quiet(session: Session) -> bool:
    """Nothing has come over the event channel, and the engine has seen all that was sent before."""
    session.event().send("PING", tag=PING_TAG)
    reply = session.event().receive()
    return reply.tag == PING_TAG


def count(reply: Reply) -> int:
    return int(struct.unpack("<Q", reply.body)[0])


def ready(session: Session) -> int:
    """The tag of the READY that comes next."""
    message = session.event().receive()
    assert (message.op, message.flags, message.error, message.body) == (OPERATIONS["READY"], 0, 0, b"")
    return message.tag
