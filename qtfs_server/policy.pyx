"""What clients may do where: the whitelist, the rules of special.toml and the protections, as tries of path components.

A vertex of the first trie holds the bits that its path and all of its ancestors are granted by the whitelist, less what
rules of special.toml take. A node of the server keeps its `place`, so that a lookup costs one step and a check one mask.
Whatever changes what a kept place means (a reload, a directory renamed between differently ruled places) advances the
epoch, and places of older epochs are found anew by path. It is replaced whole on reload.

The second trie, of qtfs_server.protected, never changes. Its paths begin at the root of a file system, wherever that is
mounted. What it takes from a place, lines of the whitelist that name a path at or below the protected one give back.
"""
from libc.errno cimport EACCES, ENOENT, EROFS
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport strchr, strlen

from qtfs_common.protocol cimport MAX_PATH
from qtfs_common.tries cimport trie, trie_child, trie_new
from qtfs_server.descriptors cimport fd_path, is_at
from qtfs_server.includes.linux cimport atomic_add_int, atomic_add_u64, atomic_load_int, atomic_load_pointer, \
    atomic_store_pointer, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock

import logging
import os
from typing import TYPE_CHECKING

from qtfs_common.errors import ConfigError
from qtfs_common.pathtree import ANY, NUMBER, PathTree, components
from qtfs_common.special import Action
from qtfs_common.whitelist import Type
from qtfs_server import protected

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qtfs_common.special import Rule
    from qtfs_common.whitelist import Whitelist

log = logging.getLogger(__name__)

cdef enum:
    CHANGES = ALLOW_WRITE | ALLOW_MKDIR | ALLOW_RMDIR | ALLOW_CREATE | ALLOW_UNLINK | ALLOW_RENAME | ALLOW_SETATTR | \
        ALLOW_SETXATTR
    ANYTHING = (1 << 12) - 1 | ALLOW_CHANGE | ALLOW_LOOK
    MOVES = ALLOW_RENAME | ALLOW_RMDIR

cdef struct vertex:                 # of the first trie
    uint16_t allowed
    uint16_t inherited              # what paths below it are allowed that have no vertex
    uint16_t gives                  # what it gives back of the protections' takings
    bint leads                      # a rule takes something below

cdef struct rules:
    trie *paths
    vertex *vertices
    int32_t first_epoch             # that they are in force in
    rules *previous
    int32_t logged[TYPES]           # a denial is logged once per type and reload
    int32_t logged_protected

# Places of earlier epochs belong to the rules that a reload replaced, so those are kept: some kilobytes for each SIGHUP.
cdef rules *_rules = NULL
cdef tuple _open_lines = ()
_commands: frozenset[bytes] = frozenset()
cdef int32_t _epoch = 1
cdef pthread_mutex_t _epoch_guard   # of changes; readers take an epoch, and then the rules that it names
pthread_mutex_init(&_epoch_guard, NULL)
cdef uint64_t _denials[TYPES]
cdef uint64_t _protected_denials = 0
cdef trie *_shields = NULL
cdef uint16_t *_shield_takes = NULL


cdef uint32_t current_epoch() noexcept nogil:
    return <uint32_t>atomic_load_int(&_epoch)


cdef void rules_moved() noexcept nogil:
    """Places found before this call may be wrong."""
    pthread_mutex_lock(&_epoch_guard)
    atomic_add_int(&_epoch, 1)
    pthread_mutex_unlock(&_epoch_guard)


cdef rules *_rules_in(uint32_t epoch) noexcept nogil:
    """The rules that were in force in an epoch: what a place holds are indexes into these and no others.

    A place from before our time has none: OFF_TRIE.
    """
    cdef rules *r = <rules *>atomic_load_pointer(<void **>&_rules)
    while <int32_t>(epoch - <uint32_t>r.first_epoch) < 0 and r.previous != NULL:
        r = r.previous
    return r


# ---- places --------------------------------------------------------------------------------------------------------

cdef inline uint16_t _taken_by(uint16_t shield) noexcept nogil:
    return _shield_takes[shield] if shield != OFF_TRIE else 0


cdef void _step_shield(place *where, const uint8_t *name, size_t length) noexcept nogil:
    """Go on to a name within the same file system. Below a vertex that protects everything is protected."""
    cdef uint32_t child
    if where.shield == OFF_TRIE:
        return
    if _shield_takes[where.shield]:
        where.depth = min(where.depth + 1, 0xffff)
        return
    child = trie_child(_shields, where.shield, name, length)
    where.shield = <uint16_t>(child or OFF_TRIE)
    where.depth = 0
    where.taken = _taken_by(where.shield)


cdef void _step_path(rules *r, place *where, const uint8_t *name, size_t length) noexcept nogil:
    """Go on to a name: what the whitelist and the rules say of it. `allowed` still lacks the protections."""
    cdef uint32_t child
    if where.trie == OFF_TRIE:
        return
    child = trie_child(r.paths, where.trie, name, length)
    if child == 0:
        where.allowed = r.vertices[where.trie].inherited
        where.trie = OFF_TRIE
    else:
        where.allowed = r.vertices[child].allowed
        where.trie = <uint16_t>child


cdef inline uint16_t _gives(const rules *r, const place *where) noexcept nogil:
    return r.vertices[where.trie].gives if where.trie != OFF_TRIE else 0


cdef place child_place(const place *parent, const uint8_t *name, size_t length) noexcept nogil:
    """The place of `name` in the directory at `parent`, if it is on the same file system; else see enter_file_system."""
    cdef place result = parent[0]
    cdef rules *r = NULL
    if result.trie == OFF_TRIE and result.shield == OFF_TRIE:
        return result
    r = _rules_in(result.epoch)
    _step_path(r, &result, name, length)
    _step_shield(&result, name, length)
    result.taken &= ~_gives(r, &result)
    result.allowed &= ~result.taken
    return result


cdef void enter_file_system(place *where, uint16_t shield) noexcept nogil:
    """Correct a place at which another file system is mounted; `shield`: of shield_of."""
    cdef rules *r = _rules_in(where.epoch)
    if where.trie != OFF_TRIE:
        where.allowed = r.vertices[where.trie].allowed
    where.shield = shield
    where.depth = 0
    where.taken = _taken_by(shield) & ~_gives(r, where)
    where.allowed &= ~where.taken


cdef int _count_components(const char *path) noexcept nogil:
    cdef int count = 0
    while path[0]:
        if path[0] == b'/' and path[1] != b'/' and path[1] != 0:
            count += 1
        path += 1
    return count


cdef place path_place(const char *path, const place *known) noexcept nogil:
    """The place of an absolute, normalised path of the server.

    Where it stands among the protections is taken over from `known`, its place before a reload; NULL: nothing protects it.
    """
    cdef uint32_t epoch = current_epoch()
    cdef rules *r = _rules_in(epoch)
    cdef place result
    cdef const char *slash
    cdef size_t length
    cdef int left = _count_components(path)
    result.epoch = epoch
    result.trie = 0
    result.allowed = r.vertices[0].allowed
    result.shield = known.shield if known != NULL else OFF_TRIE
    result.depth = known.depth if known != NULL else 0
    result.taken = _taken_by(result.shield)
    while path[0] == b'/':
        path += 1
        slash = strchr(path, b'/')
        length = slash - path if slash != NULL else strlen(path)
        if length > 0:
            left -= 1
            _step_path(r, &result, <const uint8_t *>path, length)
            if left <= result.depth:    # lines above the protected path do not count
                result.taken &= ~_gives(r, &result)
        path += length
    result.allowed &= ~result.taken
    return result


cdef place far_below_place(const char *path, const place *known) noexcept nogil:
    """The place of a directory so far below `path` that no rule reaches it. `known`: its place before a reload."""
    cdef place result = path_place(path, NULL)
    if result.trie != OFF_TRIE:
        result.allowed = _rules_in(result.epoch).vertices[result.trie].inherited
        result.trie = OFF_TRIE
    result.shield = known.shield
    result.depth = known.depth
    result.taken = known.taken
    result.allowed &= ~result.taken
    return result


cdef bint may_hide_names(const place *where) noexcept nogil:
    """Whether names in a directory may be hidden."""
    return where.trie != OFF_TRIE or where.shield != OFF_TRIE


# ---- denials -------------------------------------------------------------------------------------------------------

cdef void count_denial(uint16_t missing) noexcept nogil:
    """Count a refusal for each missing bit and log the first of its type."""
    cdef rules *r = <rules *>atomic_load_pointer(<void **>&_rules)
    cdef int kind
    for kind in range(TYPES):
        if missing & (1 << kind):
            atomic_add_u64(&_denials[kind], 1)
            if atomic_add_int(&r.logged[kind], 1) == 1:
                with gil:
                    log.warning("whitelist: a request was denied: its %s is not in [%s]",
                                "command" if kind == Type.KILL else "path", Type(kind).name.capitalize())
            elif r.logged[kind] > 1000000:
                r.logged[kind] = 2


cdef void _count_protected() noexcept nogil:
    cdef rules *r = <rules *>atomic_load_pointer(<void **>&_rules)
    atomic_add_u64(&_protected_denials, 1)
    if atomic_add_int(&r.logged_protected, 1) == 1:
        with gil:
            log.warning("a request was refused: its path is protected, or read-only or hidden by a rule")
    elif r.logged_protected > 1000000:
        r.logged_protected = 2


cdef int refusal(uint16_t allowed, uint16_t needed) noexcept nogil:
    """0 if all that is needed is allowed; else it is counted: -ENOENT (-EACCES to make it): hidden; -EROFS: read-only;
    -EACCES."""
    cdef uint16_t missing = needed & ~allowed
    if missing == 0:
        return 0
    if not allowed & ALLOW_LOOK:
        _count_protected()
        return -EACCES if missing & (ALLOW_CREATE | ALLOW_MKDIR) else -ENOENT
    if missing & CHANGES and not allowed & ALLOW_CHANGE:
        _count_protected()
        return -EROFS
    count_denial(missing)
    return -EACCES


cdef int device_refusal(int fd) noexcept nogil:
    """0 if a line of [Open] names the device that a descriptor stands for; else it is counted: -EACCES.

    Lines of /dev name all devices below them, others only the one whose path they are: who may make files below an
    exported directory could make any device there.
    """
    cdef char path[MAX_PATH]
    cdef bint named = False
    if fd_path(fd, path, sizeof(path)) > 0:
        with gil:
            named = names_device(<bytes><char *>path)
    if named and is_at(fd, path):
        return 0
    count_denial(ALLOW_OPEN)
    return -EACCES


def names_device(path: bytes) -> bool:
    """Whether a line of [Open] names a device by its real path, or the devices below a directory."""
    for line in _open_lines:
        if path == line or (line + b"/").startswith(b"/dev/") and path.startswith(line + b"/"):
            return True
    return False


def denials() -> dict[str, int]:
    """How often each whitelist type refused a request since the start, and PROTECTED for what is protected or ruled."""
    found = {Type(kind).name: _denials[kind] for kind in range(TYPES) if _denials[kind]}
    return found | ({"PROTECTED": _protected_denials} if _protected_denials else {})


# ---- protections -----------------------------------------------------------------------------------------------------

cdef bint is_procfs(int64_t f_type) noexcept nogil:
    return f_type == 0x9fa0         # PROC_SUPER_MAGIC


cdef bytes _file_system_name(int64_t f_type):
    return b"%x" % <uint64_t>f_type


cdef int _install_shields() except -1:
    global _shields, _shield_takes
    cdef uint32_t index
    tree = PathTree()
    takes = {protected.HIDDEN: ANYTHING, protected.READ_ONLY: CHANGES | ALLOW_CHANGE}
    for f_type, levels in protected.PROTECTED.items():
        for level, paths in levels.items():
            for path in paths:
                tree.add((_file_system_name(f_type), *components(path)), takes[level])
    rows = tree.rows()
    _shields = trie_new(rows)
    _shield_takes = <uint16_t *>calloc(len(rows), sizeof(uint16_t))
    if _shield_takes == NULL:
        raise MemoryError
    for index in range(<uint32_t>len(rows)):
        for mark in rows[index].branch.marks:
            _shield_takes[index] |= <uint16_t>mark
    return 0


cdef uint16_t _shield_at(uint32_t top, bytes path) noexcept:
    """The vertex of a path within a file system whose root has the vertex `top`."""
    cdef place where
    where.shield = <uint16_t>top
    where.depth = 0
    for name in components(path):
        _step_shield(&where, <const uint8_t *><const char *>name, len(name))
    return where.shield


cdef uint16_t shield_of(int64_t f_type, int fd) noexcept nogil:
    """Where an open file, which a session meets a mount by, stands among the protections: OFF_TRIE on most file systems."""
    cdef uint32_t top
    with gil:
        name = _file_system_name(f_type)
        top = trie_child(_shields, 0, <const uint8_t *><const char *>name, len(name))
        if top == 0:
            return OFF_TRIE
        try:
            return _shield_at(top, protected.path_inside(fd))
        except OSError as error:
            log.error("a mount cannot be looked up, its root is taken for that of the file system: %s", error)
            return <uint16_t>top


# ---- whitelist and rules ---------------------------------------------------------------------------------------------

cdef class _Resolved:
    """A branch of the tree while its bits are worked out."""
    cdef uint32_t index
    cdef uint16_t granted           # by the whitelist, here or above
    cdef uint16_t taken             # by rules, here or above
    cdef uint16_t gives
    cdef bint protects              # a rule takes something here or below
    cdef bint leads                 # a rule takes something below


cdef uint16_t _types_of(list marks):
    cdef uint16_t types = 0
    for mark in marks:
        if isinstance(mark, Type):
            types |= <uint16_t>(1 << int(mark))
    return types


cdef int _apply_rules(_Resolved at, list marks, uint16_t types) except -1:
    """What the branch's own marks take and give: devices unless the whitelist names them, then the last of the rules."""
    ruled = [mark for mark in marks if isinstance(mark, tuple)]
    if None in marks and not types:
        at.taken |= ANYTHING
        at.protects = True
    if not ruled:
        return 0
    _, action = max(ruled, key=lambda mark: mark[0])
    if action is Action.REMOTE:
        at.taken = 0
        at.gives = ANYTHING
    else:
        at.taken |= ANYTHING if action is Action.HIDE else CHANGES | ALLOW_CHANGE
    at.protects = action is not Action.REMOTE
    return 0


cdef _Resolved _resolve(list rows, uint32_t index, _Resolved above):
    cdef _Resolved at = _Resolved()
    cdef list marks = rows[index].branch.marks
    cdef uint16_t types = _types_of(marks)
    at.index = index
    at.granted = above.granted | types
    at.taken = above.taken
    at.gives = types
    if types:
        at.gives |= ALLOW_LOOK | (ALLOW_CHANGE if types & CHANGES else 0)
    _apply_rules(at, marks, types)
    return at


cdef int _fill(rules *r, list rows) except -1:
    cdef list found = []
    cdef _Resolved at, above
    cdef _Resolved nothing = _Resolved()
    cdef uint16_t own
    nothing.granted = ALLOW_LOOK | ALLOW_CHANGE
    for index, row in enumerate(rows):
        above = found[row.parent] if index else nothing
        found.append(_resolve(rows, index, above))
    for at in reversed(found):      # from the leaves up: what concerns who leads there
        own = at.granted & ~at.taken
        r.vertices[at.index].inherited = own
        r.vertices[at.index].allowed = own & ~MOVES if at.leads else own    # nothing is moved away from its rule
        r.vertices[at.index].gives = at.gives
        r.vertices[at.index].leads = at.leads
        if at.index:
            above = found[rows[at.index].parent]
            above.gives |= ALLOW_LOOK if at.gives else 0
            if at.protects:
                above.protects = above.leads = True
    return 0


cdef object _tree(whitelist, special):
    tree = PathTree()
    for path in protected.DEVICES:
        tree.add(components(path), None)
    for kind, paths in whitelist.paths.items():
        for path in paths:
            tree.add(components(path), kind)
    for number, rule in enumerate(special):
        if rule.action in (Action.HIDE, Action.READONLY, Action.REMOTE):
            for pattern in {rule.pattern, _real_pattern(rule.pattern)}:
                tree.add(pattern, (number, rule.action))
    return tree


def _real_pattern(pattern: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """The pattern behind symbolic links, since the kernel tells real paths: /run/x for /var/run/x. Wildcards end that."""
    wild = [i for i, name in enumerate(pattern) if name in (ANY, NUMBER)]
    literal = wild[0] if wild else len(pattern) - 1
    return (*components(os.path.realpath(b"/" + b"/".join(pattern[:literal]))), *pattern[literal:])


cdef rules *_new_rules(list rows) except NULL:
    cdef rules *r = <rules *>calloc(1, sizeof(rules))
    if r == NULL:
        raise MemoryError
    try:
        r.vertices = <vertex *>calloc(len(rows), sizeof(vertex))
        if r.vertices == NULL:
            raise MemoryError
        r.paths = trie_new(rows)
        _fill(r, rows)
    except BaseException:
        free(r.vertices)
        free(r)
        raise
    return r


def install(whitelist: "Whitelist", special: "Sequence[Rule]" = ()) -> None:
    """Put a parsed whitelist and parsed special rules into force for all requests from now on."""
    global _rules, _open_lines, _commands
    try:
        rows = _tree(whitelist, special).rows()
    except ValueError as error:
        raise ConfigError(whitelist.source, f"too long, special rules included: {error}") from error
    cdef rules *r = _new_rules(rows)
    _open_lines = tuple([b"/" + b"/".join(components(path)) for path in whitelist.paths.get(Type.OPEN, ())])
    pthread_mutex_lock(&_epoch_guard)
    r.previous = _rules
    r.first_epoch = _epoch + 1
    atomic_store_pointer(<void **>&_rules, r)
    atomic_add_int(&_epoch, 1)
    pthread_mutex_unlock(&_epoch_guard)
    _commands = frozenset(whitelist.commands)


_install_shields()


# ---- for Python ----------------------------------------------------------------------------------------------------

def granted(path: bytes) -> int:
    """The ALLOW_* bits of an absolute, normalised path of the server: 1 << Type."""
    return path_place(<const char *>path, NULL).allowed


def leads_to_rule(path: bytes) -> bool:
    """Whether something below an absolute, normalised path is hidden or read-only because of its path."""
    cdef place where = path_place(<const char *>path, NULL)
    return where.trie != OFF_TRIE and _rules_in(where.epoch).vertices[where.trie].leads


def deny(kind: "Type") -> None:
    """Count a refusal, and log the first of its type."""
    cdef uint16_t missing = <uint16_t>(1 << int(kind))
    with nogil:
        count_denial(missing)


def listed_commands() -> frozenset[bytes]:
    """The names of commands under [Kill]."""
    return _commands
