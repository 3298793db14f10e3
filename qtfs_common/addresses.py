"""Addresses: where an engine listens, and how a client reaches it.

===========================  ==========================================================================
text                         meaning
===========================  ==========================================================================
``vsock://CID:PORT``         AF_VSOCK stream; CID may be ``any`` for listening
``tcp://HOST:PORT``          TCP; an IPv6 host stands in brackets
``unix:///path``             Unix stream socket on this machine
``pcie://BDF/resourceN``     a PCIe BAR mapped from sysfs
``shm:///path``              the same rings in a shared file
``...?bell=ADDRESS``         behind either of these two: the socket address that wakes who sleeps, between machines
``2`` or ``2:12345``         vsock, as the C original took it
``192.0.2.1`` or ``::1``     TCP to that IP address
``HOST:PORT``                TCP
===========================  ==========================================================================

A missing port is :data:`DEFAULT_PORT`. Port 0 lets the kernel choose when listening. ``str()`` gives the canonical
text, which parses to an equal address. Sources: vsock(7), tcp(7), unix(7), Documentation/PCI/sysfs-pci.rst.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from qtfs_common.errors import AddressError, AddressInUseError, ConnectError, ListenError

DEFAULT_PORT = 12345
#: Bytes asked for in each direction of Unix and vsock sockets, whose buffers do not grow by themselves as TCP's do.
SOCKET_BUFFER_BYTES = 4 << 20
#: VMADDR_CID_ANY and VMADDR_PORT_ANY of linux/vm_sockets.h.
VSOCK_ANY = 0xFFFFFFFF
VSOCK_LOCAL_CID = 1

# Not in Python's socket module; asm-generic/socket.h. They lift net.core.[rw]mem_max for CAP_NET_ADMIN.
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_UNIX_PATH_MAX = 107  # sun_path less its NUL, unix(7)
# tcp(7): a peer is given up after 20 s of silence and six probes, one in 10 s.
_KEEPALIVE_IDLE_S = 20
_KEEPALIVE_INTERVAL_S = 10
_KEEPALIVE_PROBES = 6
_UNACKNOWLEDGED_MS = 80_000
_DIRECTORY_LOCK_SECONDS = 5.0
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_LOOKS_NUMERIC = re.compile(r"(0[xX][0-9A-Fa-f]*|[0-9]+)")
_BELL = "?bell="
_BDF = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])")


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """A context id and a port, both 32 bits."""

    cid: int
    port: int

    def __str__(self) -> str:
        return f"vsock://{'any' if self.cid == VSOCK_ANY else self.cid}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True if both ends are on one machine (VMADDR_CID_LOCAL)."""
        return self.cid == VSOCK_LOCAL_CID

    @property
    def requires_authentication(self) -> bool:
        """False: only the hypervisor decides who has a context id."""
        return False


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host, as a name or a canonical IP address, and a port of 16 bits."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True for 127.0.0.0/8, ::1 and the name localhost (RFC 6761); every other name counts as remote."""
        ip = _ip_address(self.host)
        if ip is None:
            return self.host == "localhost"
        mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
        return (mapped or ip).is_loopback

    @property
    def requires_authentication(self) -> bool:
        """True unless loopback: anyone on the network can reach the port."""
        return not self.is_loopback


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """An absolute path of a Unix stream socket; undecodable bytes are surrogate escapes."""

    path: str

    def __str__(self) -> str:
        return f"unix://{self.path}"

    @property
    def is_loopback(self) -> bool:
        """True: Unix sockets never leave the machine."""
        return True

    @property
    def requires_authentication(self) -> bool:
        """False: the file's mode 0600 decides who may connect."""
        return False


SocketAddress: TypeAlias = VsockAddress | TcpAddress | UnixAddress


@dataclass(frozen=True, slots=True)
class PcieAddress:
    """A PCIe function, as domain:bus:device.function, and the number of its BAR (0-5)."""

    device: str
    resource: int
    bell: SocketAddress | None = None

    def __str__(self) -> str:
        return f"pcie://{self.device}/resource{self.resource}{_bell_text(self.bell)}"

    @property
    def sysfs_path(self) -> str:
        """The file to map."""
        return f"/sys/bus/pci/devices/{self.device}/resource{self.resource}"

    @property
    def is_loopback(self) -> bool:
        """False: the other side of the bus is another machine."""
        return False

    @property
    def requires_authentication(self) -> bool:
        """False: only root of either side can map the BAR."""
        return False


@dataclass(frozen=True, slots=True)
class ShmAddress:
    """An absolute path of a file that both sides map."""

    path: str
    bell: SocketAddress | None = None

    def __str__(self) -> str:
        return f"shm://{self.path}{_bell_text(self.bell)}"

    @property
    def is_loopback(self) -> bool:
        """True: the file is on this machine, whoever else (a virtual machine) maps it."""
        return True

    @property
    def requires_authentication(self) -> bool:
        """False: the file's mode decides who may map it."""
        return False


def _bell_text(bell: SocketAddress | None) -> str:
    return "" if bell is None else f"{_BELL}{bell}"


Address: TypeAlias = SocketAddress | PcieAddress | ShmAddress


# ---------------------------------------------------------------------------------------------------------- parsing


def parse_address(text: str, default_port: int = DEFAULT_PORT) -> Address:
    """The address that ``text`` names, in any form of the module's table; raises AddressError naming the text."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _parse_bare(text, default_port)
    if scheme == "vsock":
        return _parse_vsock(text, rest, default_port)
    if scheme == "tcp":
        return _parse_tcp(text, rest, default_port)
    if scheme == "unix":
        return UnixAddress(_parse_unix_path(text, rest))
    if scheme == "pcie":
        return _parse_pcie(text, *_split_bell(text, rest, default_port))
    if scheme == "shm":
        path, bell = _split_bell(text, rest, default_port)
        return ShmAddress(_parse_path(text, path), bell)
    raise AddressError(text, f"unknown transport '{scheme}' (vsock, tcp, unix, pcie and shm exist)")


def _parse_bare(text: str, default_port: int) -> Address:
    """The original's short forms: a CID, an IP address, or either with a port."""
    if not text:
        raise AddressError(text, "is empty")
    if text.startswith("/"):
        raise AddressError(text, f"is a path: write unix://{text}")
    if _is_number(text.partition(":")[0]):
        return _parse_vsock(text, text, default_port)
    if isinstance(_ip_address(text), ipaddress.IPv6Address):
        return _parse_tcp(text, f"[{text}]", default_port)
    if ":" not in text and _ip_address(text) is None:
        raise AddressError(text, "is neither a CID, an IP address, HOST:PORT nor TRANSPORT://...")
    return _parse_tcp(text, text, default_port)


def _parse_vsock(text: str, rest: str, default_port: int) -> VsockAddress:
    cid_text, colon, port_text = rest.partition(":")
    cid = VSOCK_ANY if cid_text == "any" else _parse_number(text, cid_text, VSOCK_ANY, "CID")
    return VsockAddress(cid, _parse_number(text, port_text, VSOCK_ANY - 1, "port") if colon else default_port)


def _parse_tcp(text: str, rest: str, default_port: int) -> TcpAddress:
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")):
            raise AddressError(text, "write an IPv6 address as [ADDRESS]:PORT")
        if not isinstance(_ip_address(host), ipaddress.IPv6Address):
            raise AddressError(text, f"'{host}' is not an IPv6 address")
        colon, port_text = tail[:1], tail[1:]
    else:
        host, colon, port_text = rest.partition(":")
        if ":" in port_text:
            raise AddressError(text, "write an IPv6 address as [ADDRESS]:PORT")
    port = _parse_number(text, port_text, 65535, "port") if colon else default_port
    return TcpAddress(_canonical_host(text, host), port)


def _canonical_host(text: str, host: str) -> str:
    """An IP address in its shortest spelling, or a host name in lower case."""
    ip = _ip_address(host)
    if ip is not None:
        return str(ip)
    labels = host.removesuffix(".").split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise AddressError(text, f"'{host}' is not a host name or IP address")
    # getaddrinfo would read 10.1, 012.0.0.1 or 0x7f.1 as some IPv4 address that nobody meant.
    if _LOOKS_NUMERIC.fullmatch(labels[-1]):
        raise AddressError(text, f"'{host}' is not an IPv4 address")
    return host.lower()


def _split_bell(text: str, rest: str, default_port: int) -> tuple[str, SocketAddress | None]:
    """What stands before the bell, and the bell's address."""
    place, separator, bell_text = rest.partition(_BELL)
    if not separator:
        return rest, None
    try:
        bell = parse_address(bell_text, default_port)
    except AddressError as error:
        raise AddressError(text, f"its bell '{bell_text}': {error.reason}") from error
    if isinstance(bell, PcieAddress | ShmAddress):
        raise AddressError(text, f"its bell '{bell_text}': is no socket (vsock, tcp or unix)")
    return place, bell


def _parse_pcie(text: str, rest: str, bell: SocketAddress | None) -> PcieAddress:
    device, _, resource = rest.partition("/")
    match = _BDF.fullmatch(device.lower())
    if match is None:
        raise AddressError(text, f"'{device}' is not a PCIe function like 0000:03:00.0")
    if not re.fullmatch(r"resource[0-5]", resource):
        raise AddressError(text, f"'{resource}' is not resource0 to resource5")
    domain, bus, slot, function = match.groups()
    return PcieAddress(f"{domain or '0000'}:{bus}:{slot}.{function}", int(resource[-1]), bell)


def _parse_unix_path(text: str, path: str) -> str:
    if path.startswith("@"):
        raise AddressError(text, "abstract socket names are not supported: anyone could take them")
    path = _parse_path(text, path)
    if len(os.fsencode(path)) > _UNIX_PATH_MAX:
        raise AddressError(text, f"the path is longer than {_UNIX_PATH_MAX} bytes")
    return path


def _parse_path(text: str, path: str) -> str:
    if not path.startswith("/"):
        raise AddressError(text, "the path must be absolute (three slashes)")
    if path.endswith("/"):
        raise AddressError(text, "the path names a directory")
    if "\0" in path:
        raise AddressError(text, "the path contains a NUL byte")
    return path


def _parse_number(text: str, digits: str, largest: int, what: str) -> int:
    if not _is_number(digits) or int(digits) > largest:
        raise AddressError(text, f"'{digits}' is not a {what} (0 to {largest})")
    return int(digits)


def _is_number(text: str) -> bool:
    # str.isdigit accepts digits of other scripts, and int() chokes on thousands of them.
    return text.isascii() and text.isdigit() and len(text) <= 10


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------------------- sockets


def connect_socket(address: Address, timeout_s: float | None = None) -> socket.socket:
    """A blocking, close-on-exec stream socket connected to ``address``.

    ``timeout_s`` bounds the attempt as a whole (None: as long as the kernel tries), name resolution excepted, and does
    not stay on the socket. Raises ConnectError, or AddressError for transports that have no socket.
    """
    if isinstance(address, UnixAddress):
        return _connect_unix(address, timeout_s)
    if isinstance(address, VsockAddress):
        return _connect_vsock(address, timeout_s)
    if isinstance(address, TcpAddress):
        return _connect_tcp(address, timeout_s)
    raise AddressError(address, "this transport has no socket")


def listen_socket(address: Address, backlog: int = 1024) -> socket.socket:
    """A blocking, close-on-exec listening socket; pass what it accepts through :func:`tune_socket`.

    A Unix socket file has mode 0600 and replaces a stale one; closing the socket does not remove it. An IPv6 socket
    does not take IPv4 connections. Raises AddressInUseError if somebody listens there, ListenError otherwise, and
    AddressError for transports that have no socket.
    """
    if isinstance(address, UnixAddress):
        return _listen_unix(address, backlog)
    if isinstance(address, VsockAddress):
        return _listen_vsock(address, backlog)
    if isinstance(address, TcpAddress):
        return _listen_tcp(address, backlog)
    raise AddressError(address, "this transport has no socket")


def bound_address(sock: socket.socket) -> SocketAddress:
    """Where ``sock`` really listens: the port that the kernel chose in place of 0."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return UnixAddress(name if isinstance(name, str) else os.fsdecode(name))
    if sock.family == socket.AF_VSOCK:
        return VsockAddress(name[0], name[1])
    return TcpAddress(name[0], name[1])


def tune_socket(sock: socket.socket) -> None:
    """Options of every data socket: no delay on TCP, 4 MiB buffers on Unix and vsock (best effort).

    TCP asks a silent peer whether it lives: a machine that lost its power or its network never says so itself.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
        # Keepalive rests while anything waits for its acknowledgement.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)
    elif sock.family == socket.AF_UNIX:
        _enlarge(sock, _SO_SNDBUFFORCE, socket.SO_SNDBUF)
        _enlarge(sock, _SO_RCVBUFFORCE, socket.SO_RCVBUF)
    elif sock.family == socket.AF_VSOCK:
        with contextlib.suppress(OSError):
            # The limit (256 KiB by default) must be lifted first, vm_sockets.h. Python makes 64 bits of the numbers.
            sock.setsockopt(socket.AF_VSOCK, socket.SO_VM_SOCKETS_BUFFER_MAX_SIZE, 2 * SOCKET_BUFFER_BYTES)
            sock.setsockopt(socket.AF_VSOCK, socket.SO_VM_SOCKETS_BUFFER_SIZE, SOCKET_BUFFER_BYTES)


def tune_bell(sock: socket.socket) -> None:
    """As `tune_socket`, of a bell between machines: TCP gives a silent peer, whose channel is taken, up after 12 s."""
    tune_socket(sock)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 6)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 12_000)


def _enlarge(sock: socket.socket, forced: int, ordinary: int) -> None:
    for option in (forced, ordinary):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
            return


def _connect_unix(address: UnixAddress, timeout_s: float | None) -> socket.socket:
    sock = _new_socket(address, socket.AF_UNIX, ConnectError)
    with _closed_on_error(sock), _as_connect_error(address):
        tune_socket(sock)
        # A non-blocking connect fails with EAGAIN while the backlog is full; SO_SNDTIMEO lets the kernel wait.
        _set_send_timeout(sock, timeout_s)
        sock.connect(address.path)
        _set_send_timeout(sock, None)
    return sock


def _connect_vsock(address: VsockAddress, timeout_s: float | None) -> socket.socket:
    if address.cid == VSOCK_ANY:
        raise AddressError(address, "'any' is for listening only")
    sock = _new_socket(address, socket.AF_VSOCK, ConnectError)
    with _closed_on_error(sock), _as_connect_error(address):
        tune_socket(sock)
        sock.settimeout(timeout_s)
        sock.connect((address.cid, address.port))
        sock.settimeout(None)
    return sock


def _connect_tcp(address: TcpAddress, timeout_s: float | None) -> socket.socket:
    if address.port == 0:
        raise AddressError(address, "port 0 is for listening only")
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    failure: ConnectError | None = None
    for family, sockaddr in _resolve(address, ConnectError):
        left_s = None if deadline is None else max(deadline - time.monotonic(), 0.001)
        try:
            return _connect_tcp_one(address, family, sockaddr, left_s)
        except ConnectError as error:
            failure = error
    raise failure or ConnectError(f"cannot connect to {address}: the name has no address")


def _connect_tcp_one(
    address: TcpAddress, family: int, sockaddr: tuple[object, ...], timeout_s: float | None
) -> socket.socket:
    sock = _new_socket(address, family, ConnectError)
    with _closed_on_error(sock), _as_connect_error(address):
        tune_socket(sock)
        sock.settimeout(timeout_s)
        sock.connect(sockaddr)
        # TCP's simultaneous open can connect a socket to itself if the kernel picks the very port that it looks for.
        if sock.getsockname() == sock.getpeername():
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        sock.settimeout(None)
    return sock


def _listen_tcp(address: TcpAddress, backlog: int) -> socket.socket:
    family, sockaddr = next(iter(_resolve(address, ListenError)))
    sock = _new_socket(address, family, ListenError)
    with _closed_on_error(sock), _as_listen_error(address):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # What the address says and no more; 0.0.0.0 can then be listened on beside [::].
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        tune_socket(sock)
        sock.bind(sockaddr)
        sock.listen(backlog)
    return sock


def _listen_vsock(address: VsockAddress, backlog: int) -> socket.socket:
    sock = _new_socket(address, socket.AF_VSOCK, ListenError)
    with _closed_on_error(sock), _as_listen_error(address):
        tune_socket(sock)
        sock.bind((address.cid, address.port or VSOCK_ANY))
        sock.listen(backlog)
    return sock


def _listen_unix(address: UnixAddress, backlog: int) -> socket.socket:
    sock = _new_socket(address, socket.AF_UNIX, ListenError)
    with _closed_on_error(sock), _as_listen_error(address), _directory_locked(address):
        tune_socket(sock)
        _remove_stale_socket(address)
        # bind() gives the file the mode of the unbound socket's inode, so it is never open to others, not even briefly.
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(address.path)
        sock.listen(backlog)
    return sock


def _remove_stale_socket(address: UnixAddress) -> None:
    """Unlinks a socket file that nobody listens on; the caller holds the directory's lock."""
    try:
        mode = os.lstat(address.path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"cannot listen on {address}: the file exists and is not a socket", errno.EEXIST)
    if _has_listener(address.path):
        raise _in_use(address)
    Path(address.path).unlink()


def _has_listener(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        # Only a refusal proves that nobody is there: EAGAIN is a full backlog, EPROTOTYPE a datagram socket.
        return probe.connect_ex(path) not in (errno.ECONNREFUSED, errno.ENOENT)


@contextlib.contextmanager
def _directory_locked(address: UnixAddress) -> Iterator[None]:
    """Keeps two starting engines from taking each other's half-made socket for a stale one."""
    fd = os.open(Path(address.path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _DIRECTORY_LOCK_SECONDS
        while not _try_lock(fd):
            if time.monotonic() > deadline:  # in /tmp anyone may hold it for ever
                raise ListenError(f"cannot listen on {address}: the directory is locked by another process")
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _new_socket(address: Address, family: int, error_type: type[ConnectError] | type[ListenError]) -> socket.socket:
    try:
        return socket.socket(family, socket.SOCK_STREAM)  # close-on-exec is Python's default, PEP 446
    except OSError as error:
        raise error_type(f"{address}: {_reason(address, error)}", error.errno or 0) from error


def _resolve(
    address: TcpAddress, error_type: type[ConnectError] | type[ListenError]
) -> list[tuple[int, tuple[object, ...]]]:
    """Families and socket addresses of the host, as the resolver prefers them."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise error_type(f"{address}: cannot resolve '{address.host}': {reason}") from error
    return [(entry[0], entry[4]) for entry in found]


def _set_send_timeout(sock: socket.socket, timeout_s: float | None) -> None:
    """None waits for ever; zero in the kernel's terms means the same, so the least timeout is a microsecond."""
    micros = 0 if timeout_s is None else max(int(timeout_s * 1_000_000), 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", *divmod(micros, 1_000_000)))


@contextlib.contextmanager
def _closed_on_error(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise


@contextlib.contextmanager
def _as_connect_error(address: Address) -> Iterator[None]:
    try:
        yield
    except (TimeoutError, BlockingIOError) as error:
        raise ConnectError(f"cannot connect to {address}: timed out", errno.ETIMEDOUT) from error
    except OSError as error:
        raise ConnectError(f"cannot connect to {address}: {_reason(address, error)}", error.errno or 0) from error


@contextlib.contextmanager
def _as_listen_error(address: Address) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _in_use(address) from error
        raise ListenError(f"cannot listen on {address}: {_reason(address, error)}", error.errno or 0) from error


def _in_use(address: Address) -> AddressInUseError:
    return AddressInUseError(f"{address} is already in use: is another engine running?", errno.EADDRINUSE)


def _reason(address: Address, error: OSError) -> str:
    """The kernel's words, and what to do about it where those do not say."""
    words = error.strerror or str(error)
    if isinstance(address, VsockAddress) and error.errno in (errno.EAFNOSUPPORT, errno.ENODEV, errno.EADDRNOTAVAIL):
        return f"{words} (is the module vhost_vsock on the host, or vmw_vsock_virtio_transport in the guest, loaded?)"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{words} (not an address of this machine)"
    return words
