"""Mutual authentication with a shared key, for addresses that anyone on a network can reach.

Each side sends a fresh nonce, then proves with HMAC-SHA256 (RFC 2104) that it knows the key. The proof covers the role,
so that neither side's proof can be sent back to it, both nonces, so that an old proof is worthless, and a channel
binding: bytes both sides derive from what they negotiated, so that a proof is worth nothing on another connection.

Threat model: an active attacker on the network cannot pose as either side, but sees and may alter what follows the
handshake, unless the network itself is protected.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat

from qtfs_common.errors import ConfigError
from qtfs_common.files import open_input

NONCE_BYTES = 32
PROOF_BYTES = 32
KEY_MIN_BYTES = 16
KEY_MAX_BYTES = 4096
CLIENT = b"client"
SERVER = b"server"

_DOMAIN = b"qtfs authentication v1"


def load_key(path: str | os.PathLike[str]) -> bytes:
    """The key in a file: its bytes, less one line end.

    Raises ConfigError naming the file, if it cannot be read, is not a regular file, belongs to another user than us or
    root, grants anything to group or others, or holds fewer than 16 or more than 4096 bytes.
    """
    name = os.fspath(path)
    try:
        with open_input(name) as file:
            _check_key_file(name, os.fstat(file.fileno()))
            data = file.read(KEY_MAX_BYTES + 3)
    except OSError as error:
        raise ConfigError(name, f"cannot read the key: {error.strerror}") from error
    key = data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\n") else data
    if not KEY_MIN_BYTES <= len(key) <= KEY_MAX_BYTES:
        raise ConfigError(name, f"the key must have {KEY_MIN_BYTES} to {KEY_MAX_BYTES} bytes")
    return key


def new_nonce() -> bytes:
    """32 unpredictable bytes; use one per handshake."""
    return secrets.token_bytes(NONCE_BYTES)


def proof(key: bytes, role: bytes, client_nonce: bytes, server_nonce: bytes, channel_binding: bytes) -> bytes:
    """32 bytes that only a holder of ``key`` in ``role`` (CLIENT or SERVER) can make for this handshake.

    Raises ValueError for another role, or a key or nonce of the wrong size: those are mistakes of the caller.
    """
    if role not in (CLIENT, SERVER):
        raise ValueError(f"unknown role {role!r}")
    if len(key) < KEY_MIN_BYTES:
        raise ValueError(f"the key has fewer than {KEY_MIN_BYTES} bytes")
    if len(client_nonce) != NONCE_BYTES or len(server_nonce) != NONCE_BYTES:
        raise ValueError(f"a nonce has {NONCE_BYTES} bytes")
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in (_DOMAIN, role, client_nonce, server_nonce, channel_binding):
        # With their lengths, no two different sets of parts make the same input.
        mac.update(len(part).to_bytes(4, "little"))
        mac.update(part)
    return mac.digest()


def verify(
    received: bytes, key: bytes, role: bytes, client_nonce: bytes, server_nonce: bytes, channel_binding: bytes
) -> bool:
    """Whether ``received`` is the proof of the peer in ``role``; takes the same time whatever it holds."""
    return hmac.compare_digest(received, proof(key, role, client_nonce, server_nonce, channel_binding))


def _check_key_file(name: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(name, "the key is not a regular file")
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(name, f"the key belongs to another user (uid {found.st_uid})")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise ConfigError(name, f"the key is accessible to others (mode {mode:04o}): chmod 600 it")
