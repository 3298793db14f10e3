"""Authentication: the key file, and proofs that fit one role, one handshake and one connection."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtfs_common.auth import CLIENT, SERVER, load_key, new_nonce, proof, verify
from qtfs_common.errors import ConfigError

KEY = bytes(range(32))
NONCES = (b"c" * 32, b"s" * 32)


def key_file(tmp_path: Path, data: bytes, mode: int = 0o600) -> Path:
    path = tmp_path / "key"
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("data", "key"),
    [
        (KEY, KEY),
        (KEY + b"\n", KEY),
        (KEY + b"\r\n", KEY),
        (KEY + b"\n\n", KEY + b"\n"),
        (KEY + b"\r", KEY + b"\r"),
        (b"x" * 16, b"x" * 16),
        (b"x" * 4096 + b"\r\n", b"x" * 4096),
    ],
)
def test_a_key_is_its_file_less_one_line_end(tmp_path: Path, data: bytes, key: bytes) -> None:
    assert load_key(key_file(tmp_path, data, 0o400)) == key


@pytest.mark.parametrize("data", [b"", b"x" * 15, b"x" * 15 + b"\n", b"x" * 4097, b"x" * 5000])
def test_a_key_of_the_wrong_size_is_refused(tmp_path: Path, data: bytes) -> None:
    path = key_file(tmp_path, data)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: the key must have 16 to 4096 bytes")):
        load_key(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601])
def test_a_key_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, KEY, mode)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: the key is accessible to others (mode {mode:04o})")):
        load_key(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_another_users_key_is_refused(tmp_path: Path) -> None:
    path = key_file(tmp_path, KEY)
    os.chown(path, 4321, 4321)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: the key belongs to another user (uid 4321)")):
        load_key(path)


def test_a_key_that_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/fifo: the key is not a regular file")):
        load_key(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "no"):
        with pytest.raises(ConfigError, match=re.escape(f"{path}: cannot read the key")):
            load_key(path)


def test_the_proof_is_what_the_specification_says() -> None:
    parts = [b"qtfs authentication v1", b"client", *NONCES, b"binding"]
    text = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    assert proof(KEY, CLIENT, *NONCES, b"binding") == hmac.digest(KEY, text, hashlib.sha256)


def test_both_sides_convince_each_other() -> None:
    for role in (CLIENT, SERVER):
        assert verify(proof(KEY, role, *NONCES, b"b"), KEY, role, *NONCES, b"b")


def test_a_proof_fits_nothing_else() -> None:
    given_proof = proof(KEY, CLIENT, *NONCES, b"b")
    assert not verify(given_proof, KEY, SERVER, *NONCES, b"b")  # reflected
    assert not verify(given_proof, KEY[::-1], CLIENT, *NONCES, b"b")
    assert not verify(given_proof, KEY, CLIENT, *NONCES[::-1], b"b")
    assert not verify(given_proof, KEY, CLIENT, b"C" * 32, NONCES[1], b"b")
    assert not verify(given_proof, KEY, CLIENT, NONCES[0], b"S" * 32, b"b")  # replayed
    assert not verify(given_proof, KEY, CLIENT, *NONCES, b"B")  # relayed
    assert not verify(given_proof[:-1], KEY, CLIENT, *NONCES, b"b")
    assert not verify(b"", KEY, CLIENT, *NONCES, b"b")


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_different_bindings_give_different_proofs(first: bytes, second: bytes) -> None:
    same = proof(KEY, CLIENT, *NONCES, first) == proof(KEY, CLIENT, *NONCES, second)
    assert same == (first == second)


def test_callers_mistakes_are_not_turned_into_weak_proofs() -> None:
    with pytest.raises(ValueError, match="unknown role b'root'"):
        proof(KEY, b"root", *NONCES, b"")
    with pytest.raises(ValueError, match="fewer than 16"):
        proof(b"short", CLIENT, *NONCES, b"")
    for nonces in ((b"", NONCES[1]), (NONCES[0], b"s" * 33)):
        with pytest.raises(ValueError, match="a nonce has 32 bytes"):
            proof(KEY, CLIENT, *nonces, b"")


def test_nonces_are_fresh() -> None:
    assert len({new_nonce() for _ in range(100)}) == 100
    assert len(new_nonce()) == 32
