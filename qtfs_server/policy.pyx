"""The whitelist as a trie of path components, read by every request and replaced whole on reload.

A vertex holds the bits that its path and all of its ancestors are granted. A node of the server keeps its `place`, so
that a lookup costs one step and a check one mask. Whatever changes what a kept place means (a reload, a directory
renamed between differently ruled places) advances the epoch, and places of older epochs are found anew by path.
"""
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, malloc
from libc.string cimport memcmp, memcpy, strchr, strlen

from qtfs_server.includes.linux cimport atomic_add_int, atomic_add_u64, atomic_load_int, atomic_load_pointer, \
    atomic_store_pointer

import logging
from typing import TYPE_CHECKING

from qtfs_common.errors import ConfigError
from qtfs_common.whitelist import Type

if TYPE_CHECKING:
    from qtfs_common.whitelist import Whitelist

log = logging.getLogger(__name__)

cdef struct vertex:
    uint16_t allowed
    uint16_t here_only              # bits of `allowed` that do not reach what lies below
    uint8_t *name
    size_t name_bytes
    uint32_t first_child            # 0: none; the root is never a child
    uint32_t next_sibling

cdef struct rules:
    vertex *vertices
    uint32_t count
    int32_t logged[TYPES]           # a denial is logged once per type and reload

# Readers may still hold the rules that a reload replaced, so those are kept: some kilobytes for each SIGHUP.
cdef rules *_rules = NULL
cdef int32_t _epoch = 1
cdef uint64_t _denials[TYPES]
_commands: frozenset[bytes] = frozenset()


cdef uint32_t current_epoch() noexcept nogil:
    return <uint32_t>atomic_load_int(&_epoch)


cdef void rules_moved() noexcept nogil:
    """Places found before this call may be wrong."""
    atomic_add_int(&_epoch, 1)


cdef uint32_t _find_child(rules *r, uint32_t parent, const uint8_t *name, size_t length) noexcept nogil:
    cdef uint32_t child = r.vertices[parent].first_child
    while child != 0:
        if r.vertices[child].name_bytes == length and memcmp(r.vertices[child].name, name, length) == 0:
            return child
        child = r.vertices[child].next_sibling
    return 0


cdef place child_place(const place *parent, const uint8_t *name, size_t length) noexcept nogil:
    """The place of `name` in the directory at `parent`."""
    cdef place result = parent[0]
    cdef rules *r = <rules *>atomic_load_pointer(<void **>&_rules)
    cdef uint32_t child
    if result.trie == OFF_TRIE:
        return result
    child = _find_child(r, result.trie, name, length)
    if child != 0:
        result.allowed = r.vertices[child].allowed
    else:
        result.allowed &= ~r.vertices[result.trie].here_only
    result.trie = <uint16_t>(child or OFF_TRIE)
    return result


cdef place path_place(const char *path) noexcept nogil:
    """The place of an absolute, normalised path of the server."""
    cdef rules *r = <rules *>atomic_load_pointer(<void **>&_rules)
    cdef place result
    cdef const char *slash
    cdef size_t length
    result.epoch = current_epoch()
    result.trie = 0
    result.allowed = r.vertices[0].allowed
    while path[0] == b'/':
        path += 1
        slash = strchr(path, b'/')
        length = slash - path if slash != NULL else strlen(path)
        if length > 0:
            result = child_place(&result, <const uint8_t *>path, length)
        path += length
    return result


cdef void count_denial(uint16_t missing) noexcept nogil:
    """Count a refusal for each missing bit and log the first of its type."""
    cdef rules *r = <rules *>atomic_load_pointer(<void **>&_rules)
    cdef int kind
    if missing & ALLOW_DEVICE:
        missing |= 1                    # of [Open]
    for kind in range(TYPES):
        if missing & (1 << kind):
            atomic_add_u64(&_denials[kind], 1)
            if atomic_add_int(&r.logged[kind], 1) == 1:
                with gil:
                    log.warning("whitelist: a request was denied: its %s is not in [%s]",
                                "command" if kind == Type.KILL else "path", Type(kind).name.capitalize())
            elif r.logged[kind] > 1000000:
                r.logged[kind] = 2


cdef uint32_t _add_vertex(rules *r, uint32_t parent, bytes name):
    cdef uint32_t index = r.count
    cdef vertex *v = &r.vertices[index]
    r.count += 1
    v.name = <uint8_t *>malloc(max(1, len(name)))
    if v.name == NULL:
        raise MemoryError
    memcpy(v.name, <const char *>name, len(name))
    v.name_bytes = len(name)
    v.next_sibling = r.vertices[parent].first_child
    r.vertices[parent].first_child = index
    return index


cdef void _inherit(rules *r, uint32_t parent) noexcept:
    cdef uint32_t child = r.vertices[parent].first_child
    while child != 0:
        r.vertices[child].allowed |= r.vertices[parent].allowed & ~r.vertices[parent].here_only
        _inherit(r, child)
        child = r.vertices[child].next_sibling


cdef void _name_device(vertex *named, bytes path):
    """An Open line of /dev names all devices there. Elsewhere only the one whose path it is: who may create files below
    an exported directory could make any device there.
    """
    named.allowed |= <uint16_t>ALLOW_DEVICE
    if not (path + b"/").startswith(b"/dev/"):
        named.here_only |= <uint16_t>ALLOW_DEVICE


def install(whitelist: "Whitelist") -> None:
    """Put a parsed whitelist into force for all requests from now on."""
    global _rules, _commands
    cdef uint32_t at
    cdef size_t room = 1 + sum([path.count(b"/") + 1 for paths in whitelist.paths.values() for path in paths])
    cdef rules *r = <rules *>calloc(1, sizeof(rules))
    if room >= OFF_TRIE:
        raise ConfigError(whitelist.source, f"too long: its paths have {room} components (at most {OFF_TRIE - 1})")
    if r != NULL:
        r.vertices = <vertex *>calloc(room, sizeof(vertex))
    if r == NULL or r.vertices == NULL:
        raise MemoryError
    r.count = 1
    for kind, paths in whitelist.paths.items():
        for path in paths:
            at = 0
            for name in filter(None, path.split(b"/")):
                at = _find_child(r, at, <const uint8_t *><const char *>name, len(name)) or _add_vertex(r, at, name)
            r.vertices[at].allowed |= <uint16_t>(1 << int(kind))
            if kind == Type.OPEN:
                _name_device(&r.vertices[at], path)
    _inherit(r, 0)
    atomic_store_pointer(<void **>&_rules, r)
    _commands = frozenset(whitelist.commands)
    rules_moved()


def denials() -> dict[str, int]:
    """How often each whitelist type refused a request since the start."""
    return {Type(kind).name: _denials[kind] for kind in range(TYPES) if _denials[kind]}


# ---- for Python ----------------------------------------------------------------------------------------------------

def granted(path: bytes) -> int:
    """The ALLOW_* bits of an absolute, normalised path of the server: 1 << Type."""
    return path_place(<const char *>path).allowed


def deny(kind: "Type") -> None:
    """Count a refusal, and log the first of its type."""
    cdef uint16_t missing = <uint16_t>(1 << int(kind))
    with nogil:
        count_denial(missing)


def listed_commands() -> frozenset[bytes]:
    """The names of commands under [Kill]."""
    return _commands
