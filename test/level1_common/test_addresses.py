"""Addresses: every spelling, every mistake, and the sockets that they lead to (loopback only)."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtfs_common import addresses
from qtfs_common.addresses import (
    DEFAULT_PORT,
    VSOCK_ANY,
    Address,
    PcieAddress,
    ShmAddress,
    TcpAddress,
    UnixAddress,
    VsockAddress,
    bound_address,
    connect_socket,
    listen_socket,
    parse_address,
    tune_socket,
)
from qtfs_common.errors import AddressError, AddressInUseError, ConnectError, ListenError

SPELLINGS = [
    ("2", VsockAddress(2, DEFAULT_PORT)),
    ("2:777", VsockAddress(2, 777)),
    ("vsock://3", VsockAddress(3, DEFAULT_PORT)),
    ("vsock://3:4294967294", VsockAddress(3, 4294967294)),
    ("vsock://any:1", VsockAddress(VSOCK_ANY, 1)),
    ("192.0.2.1", TcpAddress("192.0.2.1", DEFAULT_PORT)),
    ("192.0.2.1:80", TcpAddress("192.0.2.1", 80)),
    ("::1", TcpAddress("::1", DEFAULT_PORT)),
    ("DPU0.example:9", TcpAddress("dpu0.example", 9)),
    ("tcp://dpu_0", TcpAddress("dpu_0", DEFAULT_PORT)),
    ("tcp://[2001:DB8:0::1]:65535", TcpAddress("2001:db8::1", 65535)),
    ("tcp://[::1]", TcpAddress("::1", DEFAULT_PORT)),
    ("unix:///run/q s.sock", UnixAddress("/run/q s.sock")),
    ("unix:///" + "x" * 106, UnixAddress("/" + "x" * 106)),
    ("pcie://03:00.1/resource2", PcieAddress("0000:03:00.1", 2)),
    ("pcie://10000:AB:1f.7/resource0", PcieAddress("10000:ab:1f.7", 0)),
    ("shm:///dev/shm/ring", ShmAddress("/dev/shm/ring")),
    ("shm:///ring?bell=2", ShmAddress("/ring", VsockAddress(2, DEFAULT_PORT))),
    ("shm:///ring?x", ShmAddress("/ring?x")),
    ("pcie://03:00.1/resource2?bell=[::1]:7", PcieAddress("0000:03:00.1", 2, TcpAddress("::1", 7))),
]

MISTAKES = [
    ("", "is empty"),
    ("host", "neither"),
    ("1.2.3", "neither"),
    ("/run/x.sock", "unix:///run/x.sock"),
    ("http://x", "unknown transport 'http'"),
    ("4294967296", "'4294967296' is not a CID"),
    ("2:", "'' is not a port"),
    ("2:x", "'x' is not a port"),
    ("vsock://", "'' is not a CID"),
    ("vsock://-1:5", "'-1' is not a CID"),
    ("vsock://2:4294967295", "'4294967295' is not a port"),
    ("vsock://" + "9" * 5000, "is not a CID"),
    ("vsock://\u0662:1", "is not a CID"),  # a digit, but not ours
    ("tcp://", "'' is not a host name"),
    ("tcp://:5", "'' is not a host name"),
    ("tcp://h:65536", "'65536' is not a port"),
    ("tcp://h:", "'' is not a port"),
    ("tcp://1.2.3.4.5", "'1.2.3.4.5' is not an IPv4 address"),
    ("tcp://012.0.0.1", "'012.0.0.1' is not an IPv4 address"),
    ("tcp://127.0x1", "'127.0x1' is not an IPv4 address"),
    ("tcp://a b", "'a b' is not a host name"),
    ("tcp://-a", "'-a' is not a host name"),
    ("tcp://h/x", "'h/x' is not a host name"),
    ("tcp://" + "a." * 130 + "b", "is not a host name"),
    ("tcp://::1", "[ADDRESS]:PORT"),
    ("tcp://[::1", "[ADDRESS]:PORT"),
    ("tcp://[::1]x", "[ADDRESS]:PORT"),
    ("tcp://[1.2.3.4]", "'1.2.3.4' is not an IPv6 address"),
    ("unix://run/x", "must be absolute"),
    ("unix:///", "names a directory"),
    ("unix:///a\0b", "NUL"),
    ("unix://@x", "abstract"),
    ("unix:///" + "x" * 107, "longer than 107 bytes"),
    ("unix:///" + "\u00e9" * 54, "longer than 107 bytes"),  # 108 bytes, 54 characters
    ("pcie://3:0.0/resource0", "'3:0.0' is not a PCIe function"),
    ("pcie://03:00.8/resource0", "'03:00.8' is not a PCIe function"),
    ("pcie://03:20.0/resource0", "'03:20.0' is not a PCIe function"),
    ("pcie://03:00.0", "'' is not resource0"),
    ("pcie://03:00.0/resource6", "'resource6' is not resource0"),
    ("shm://x", "must be absolute"),
    ("shm:///x?bell=", "its bell '': is empty"),
    ("shm:///x?bell=tcp://h:x", "its bell 'tcp://h:x': 'x' is not a port"),
    ("pcie://03:00.0/resource0?bell=shm:///y", "its bell 'shm:///y': is no socket"),
    ("shm:///?bell=2", "names a directory"),
]


@pytest.mark.parametrize(("text", "address"), SPELLINGS)
def test_every_spelling_is_understood(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(("text", "reason"), MISTAKES)
def test_every_mistake_is_named(text: str, reason: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_address(text)
    assert reason in str(caught.value)
    assert f"'{text}'" in str(caught.value)


def test_the_default_port_gives_way_to_the_callers() -> None:
    assert parse_address("2", 99) == VsockAddress(2, 99)
    assert parse_address("tcp://h", 99) == TcpAddress("h", 99)
    assert parse_address("::1", 99) == TcpAddress("::1", 99)
    assert parse_address("tcp://h:1", 99) == TcpAddress("h", 1)


PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=26).map(
    lambda name: "/" + name.rstrip("/") + "x"
)
SOCKETS = st.one_of(
    st.builds(VsockAddress, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 2)),
    st.builds(
        TcpAddress,
        st.one_of(
            st.ip_addresses().map(str),
            st.from_regex(r"[a-z]([a-z0-9_-]{0,20}[a-z])?(\.[a-z]{1,9}){0,3}", fullmatch=True),
        ),
        st.integers(0, 65535),
    ),
    st.builds(UnixAddress, PATHS),
)
BELLS = st.none() | SOCKETS
ADDRESSES = st.one_of(
    SOCKETS,
    st.builds(ShmAddress, PATHS, BELLS),
    st.builds(
        PcieAddress,
        st.from_regex(r"[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]", fullmatch=True),
        st.integers(0, 5),
        BELLS,
    ),
)


@given(ADDRESSES)
def test_canonical_text_parses_to_an_equal_address(address: Address) -> None:
    assert parse_address(str(address)) == address


@given(st.text(max_size=40) | st.from_regex(r"(tcp|vsock|unix|pcie|shm)://[ -~]{0,20}", fullmatch=True))
def test_any_text_parses_to_a_stable_address_or_is_refused(text: str) -> None:
    try:
        address = parse_address(text)
    except AddressError as error:
        assert repr(text)[1:-1] in repr(str(error)) or f"'{text}'" in str(error)
    else:
        assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("text", "loopback", "authenticated"),
    [
        ("tcp://127.0.0.1", True, False),
        ("tcp://127.255.0.9", True, False),
        ("tcp://[::1]", True, False),
        ("tcp://[::ffff:127.0.0.1]", True, False),
        ("tcp://LOCALHOST", True, False),
        ("tcp://localhost.example", False, True),
        ("tcp://0.0.0.0", False, True),
        ("tcp://[::]", False, True),
        ("tcp://192.168.0.1", False, True),
        ("tcp://[::ffff:192.0.2.1]", False, True),
        ("vsock://1", True, False),
        ("vsock://2", False, False),
        ("unix:///x", True, False),
        ("shm:///x", True, False),
        ("pcie://03:00.0/resource0", False, False),
    ],
)
def test_only_tcp_beyond_loopback_needs_authentication(text: str, loopback: bool, authenticated: bool) -> None:
    address = parse_address(text)
    assert (address.is_loopback, address.requires_authentication) == (loopback, authenticated)


def test_a_bar_is_found_in_sysfs() -> None:
    assert PcieAddress("0000:03:00.0", 2).sysfs_path == "/sys/bus/pci/devices/0000:03:00.0/resource2"


# ---------------------------------------------------------------------------------------------------------- sockets


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
            return True
    except OSError:
        return False


IPV6 = pytest.mark.skipif(not _has_ipv6(), reason="the machine has no IPv6 loopback")


@pytest.fixture(params=["unix", "tcp", pytest.param("tcp6", marks=IPV6)])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    texts = {"unix": f"unix://{tmp_path}/s", "tcp": "tcp://127.0.0.1:0", "tcp6": "tcp://[::1]:0"}
    with listen_socket(parse_address(texts[request.param])) as sock:
        yield sock


def test_bytes_pass_both_ways(listener: socket.socket) -> None:
    with connect_socket(bound_address(listener), 5) as client, listener.accept()[0] as server:
        client.sendall(b"ping")
        assert server.recv(9) == b"ping"
        server.sendall(b"pong")
        assert client.recv(9) == b"pong"


def test_sockets_block_and_close_on_exec(listener: socket.socket) -> None:
    with connect_socket(bound_address(listener), 5) as client:
        for sock in (listener, client):
            assert sock.gettimeout() is None
            assert not sock.get_inheritable()
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16) == bytes(16)


def test_a_second_listener_is_refused_by_name(listener: socket.socket) -> None:
    address = bound_address(listener)
    with pytest.raises(AddressInUseError, match="already in use") as caught:
        listen_socket(address)
    assert str(address) in str(caught.value)
    assert caught.value.errno == errno.EADDRINUSE
    connect_socket(address, 5).close()  # the first still serves


def test_a_closed_port_refuses_by_name(listener: socket.socket) -> None:
    address = bound_address(listener)
    listener.close()
    with pytest.raises(ConnectError, match="Connection refused") as caught:
        connect_socket(address, 5)
    assert str(address) in str(caught.value)
    assert caught.value.errno == errno.ECONNREFUSED


def test_a_tcp_port_can_be_listened_on_again_at_once() -> None:
    with listen_socket(TcpAddress("127.0.0.1", 0)) as first:
        address = bound_address(first)
        client = connect_socket(address, 5)
        first.accept()[0].close()  # the server closes first: TIME_WAIT stays on its port
        client.close()
    listen_socket(address).close()


def test_tcp_does_not_delay_and_keeps_its_autotuned_buffers() -> None:
    with (
        listen_socket(TcpAddress("127.0.0.1", 0)) as listener,
        connect_socket(bound_address(listener), 5) as client,
        listener.accept()[0] as server,
        socket.create_connection(listener.getsockname()) as untouched,
    ):
        tune_socket(server)
        for sock in (client, server):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        sizes = [sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for sock in (client, untouched)]
        assert sizes[0] == sizes[1]


@IPV6
def test_ipv4_and_ipv6_listen_side_by_side() -> None:
    with listen_socket(TcpAddress("::", 0)) as six:
        port = six.getsockname()[1]
        listen_socket(TcpAddress("0.0.0.0", port)).close()


def test_unix_buffers_grow(tmp_path: Path) -> None:
    with listen_socket(UnixAddress(f"{tmp_path}/s")) as listener, connect_socket(bound_address(listener)) as client:
        with socket.socket(socket.AF_UNIX) as plain:
            before = plain.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        limit = int(Path("/proc/sys/net/core/wmem_max").read_text())
        wanted = addresses.SOCKET_BUFFER_BYTES if os.geteuid() == 0 else min(limit, addresses.SOCKET_BUFFER_BYTES)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == max(2 * wanted, before)  # socket(7) doubles


def test_a_unix_socket_is_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        listen_socket(UnixAddress(f"{tmp_path}/s")).close()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


def test_a_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    address = UnixAddress(f"{tmp_path}/s")
    listen_socket(address).close()
    assert (tmp_path / "s").is_socket()
    with listen_socket(address):
        connect_socket(address, 5).close()


def test_a_unix_listener_with_a_full_backlog_is_alive(tmp_path: Path) -> None:
    address = UnixAddress(f"{tmp_path}/s")
    with listen_socket(address, backlog=0), connect_socket(address), pytest.raises(AddressInUseError):
        listen_socket(address)


def test_a_full_backlog_times_out(tmp_path: Path) -> None:
    address = UnixAddress(f"{tmp_path}/s")
    timed_out = pytest.raises(ConnectError, match="timed out")
    with listen_socket(address, backlog=0), connect_socket(address), timed_out as caught:
        connect_socket(address, 0.01)
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_file_in_the_place_of_a_socket_is_kept(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("mine")
    with pytest.raises(ListenError, match=f"{tmp_path}/s: the file exists and is not a socket"):
        listen_socket(UnixAddress(f"{tmp_path}/s"))
    assert (tmp_path / "s").read_text() == "mine"


def test_a_link_to_a_socket_is_kept(tmp_path: Path) -> None:
    listen_socket(UnixAddress(f"{tmp_path}/s")).close()
    (tmp_path / "link").symlink_to("s")
    with pytest.raises(ListenError, match="not a socket"):
        listen_socket(UnixAddress(f"{tmp_path}/link"))
    assert (tmp_path / "s").is_socket()


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match=f"{tmp_path}/no/s: No such file"):
        listen_socket(UnixAddress(f"{tmp_path}/no/s"))
    with pytest.raises(ConnectError, match=f"{tmp_path}/no/s: No such file"):
        connect_socket(UnixAddress(f"{tmp_path}/no/s"))


def test_of_many_that_replace_a_stale_socket_one_wins(tmp_path: Path) -> None:
    address = UnixAddress(f"{tmp_path}/s")
    listen_socket(address).close()
    start = threading.Barrier(8)
    won: list[socket.socket] = []
    lost: list[AddressInUseError] = []

    def take() -> None:
        start.wait()
        try:
            won.append(listen_socket(address))
        except AddressInUseError as error:
            lost.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)
    with won[0]:
        connect_socket(address, 5).close()


def test_a_directory_locked_for_ever_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_DIRECTORY_LOCK_SECONDS", -1.0)
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with pytest.raises(ListenError, match="locked by another process"):
            listen_socket(UnixAddress(f"{tmp_path}/s"))
    finally:
        os.close(fd)


def test_failures_leave_no_descriptor_behind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = os.listdir("/proc/self/fd")
    for text in (f"unix://{tmp_path}/file", f"unix://{tmp_path}/no/s", "tcp://192.0.2.1:0"):
        with pytest.raises(ListenError):
            listen_socket(parse_address(text))
    with pytest.raises(ConnectError):
        connect_socket(parse_address(f"unix://{tmp_path}/file"))
    assert os.listdir("/proc/self/fd") == before


def test_a_tcp_socket_connected_to_itself_counts_as_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    make = socket.socket

    def bound_to_the_target(*arguments: int) -> socket.socket:
        sock = make(*arguments)
        sock.bind(("127.0.0.1", port))
        return sock

    monkeypatch.setattr(socket, "socket", bound_to_the_target)
    with pytest.raises(ConnectError, match="Connection refused"):
        connect_socket(TcpAddress("127.0.0.1", port), 5)


def test_an_address_of_another_machine_is_explained() -> None:
    with pytest.raises(ListenError, match=r"tcp://192\.0\.2\.1:0.*not an address of this machine"):
        listen_socket(TcpAddress("192.0.2.1", 0))


def test_a_name_that_does_not_resolve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(ConnectError, match="cannot resolve 'nowhere': Name or service not known"):
        connect_socket(TcpAddress("nowhere", 1), 5)


def test_connecting_tries_every_address_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen_socket(TcpAddress("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with connect_socket(TcpAddress("both", port), 5) as client:
            assert client.getpeername() == ("127.0.0.1", port)


@pytest.mark.parametrize("text", ["tcp://127.0.0.1:0", "vsock://any:5"])
def test_addresses_for_listening_are_not_connected_to(text: str) -> None:
    with pytest.raises(AddressError, match="for listening only"):
        connect_socket(parse_address(text))


@pytest.mark.parametrize("text", ["pcie://0000:03:00.0/resource2", "shm:///dev/shm/x"])
def test_transports_without_a_socket_say_so(text: str) -> None:
    for use in (connect_socket, listen_socket):
        with pytest.raises(AddressError, match="has no socket") as caught:
            use(parse_address(text))
        assert text in str(caught.value)


def test_vsock_without_a_device_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    monkeypatch.setattr(socket, "socket", fail)
    with pytest.raises(ConnectError, match=r"vsock://2:12345.*vhost_vsock"):
        connect_socket(VsockAddress(2, 12345))


def _has_vsock_loopback() -> bool:
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.bind((addresses.VSOCK_LOCAL_CID, VSOCK_ANY))
            return True
    except OSError:
        return False


@pytest.mark.skipif(not _has_vsock_loopback(), reason="the kernel has no vsock_loopback")
def test_vsock_loopback() -> None:
    with listen_socket(VsockAddress(addresses.VSOCK_LOCAL_CID, 0)) as listener:
        address = bound_address(listener)
        assert isinstance(address, VsockAddress) and address.port not in (0, VSOCK_ANY)
        with connect_socket(address, 5) as client, listener.accept()[0] as server:
            client.sendall(b"ping")
            assert server.recv(9) == b"ping"
            size = server.getsockopt(socket.AF_VSOCK, socket.SO_VM_SOCKETS_BUFFER_SIZE, 8)
            assert int.from_bytes(size, "little") == addresses.SOCKET_BUFFER_BYTES
        with pytest.raises(AddressInUseError):
            listen_socket(address)
