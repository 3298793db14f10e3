"""Special rules: names that this side of the mount answers for itself, leaves out, or keeps from being changed.

A rule is for a path below the mount's source, so what has to be known of a directory is which vertex of the rules' trie
it is: the root's is the first, others are noted (known_node) when a LOOKUP leads to them, until the kernel forgets them.
So are files and directories that are read-only. All other nodes cost one search in that table, and only in requests that
rules can have a part in; on a mount without rules, nothing.

Symbolic links and files that rules make have nodes of their own, made_nodes.pyx.

The kernel never caches ruled names, or attributes of what rules are about. Everything else is relayed as ever: a `detour`
puts a function of this module before the one that answers, or serves.
"""
from libc.errno cimport EACCES, EEXIST, EIO, ENOENT, EPERM, EROFS
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memmove, memset

from qtfs_client.drivers.fuse3.callers cimport process_is_called
from qtfs_client.drivers.fuse3.device cimport reply_error
from qtfs_client.drivers.fuse3.known_nodes cimport find_known, forget_known, note_known, standing
from qtfs_client.drivers.fuse3.made_nodes cimport MadeNodes, is_made, reply_made_entry, serve_made, take_production
from qtfs_client.drivers.fuse3.replies cimport queue_forget
from qtfs_client.drivers.fuse3.special_state cimport DO_HIDE, DO_LINK, DO_PROTECT, DO_RELAY, DO_REPLACE, known_node, \
    special_rule, special_state, special_vertex
from qtfs_client.drivers.fuse3.state cimport mount_state, worker
from qtfs_client.includes.fuse_abi cimport *
from qtfs_client.includes.linux cimport O_ACCMODE, O_RDONLY, O_TRUNC, W_OK, pthread_mutex_destroy, pthread_mutex_init, \
    strnlen
from qtfs_common.protocol cimport MAX_NAME, NODE_UNCACHED, direntry, direntry_bytes, direntry_plus, entry
from qtfs_common.transport cimport message
from qtfs_common.tries cimport trie_child, trie_free, trie_new

import weakref

from qtfs_common.errors import QtfsError
from qtfs_common.pathtree import PathTree
from qtfs_common.special import Action

cdef enum:
    NO_RULE = -1
    NOWHERE = 0xffffffff            # a node that only is read-only: no rule is for what lies below it
    FEWEST_BUCKETS = 256
    DIGIT_ZERO = 48
    DT_REG = 8
    DT_LNK = 10
    SET_FLAGS = 0x40086602          # FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR: <linux/fs.h>
    SET_FSXATTR = 0x401c5820


# ---- which rule ------------------------------------------------------------------------------------------------------

cdef uint64_t _as_number(const char *name, size_t length) noexcept nogil:
    cdef uint64_t value = 0
    cdef size_t i
    for i in range(length):
        value = value * 10 + <uint64_t>(name[i] - DIGIT_ZERO)
    return value


cdef int _rule_of(special_state *s, uint32_t vertex, const char *name, size_t length) noexcept nogil:
    """The rule that decides about a name at a vertex, 0 being none; or NO_RULE."""
    cdef special_vertex *v = &s.vertices[vertex]
    cdef uint32_t i
    cdef special_rule *rule
    if vertex == 0:
        return NO_RULE
    for i in range(v.first_rule, v.first_rule + v.rule_count):
        rule = &s.rules[s.order[i]]
        if rule.commands == NULL or process_is_called(_as_number(name, length), rule.commands):
            return <int>s.order[i]
    return NO_RULE


cdef uint32_t _step(special_state *s, const standing *at, const char *name, size_t length) noexcept nogil:
    """The vertex of a name in a directory; 0: none."""
    return trie_child(s.paths, at.vertex, <const uint8_t *>name, length) if at.vertex != NOWHERE else 0


cdef const char *_name(worker *w, size_t offset, size_t *length) noexcept nogil:
    """The name at an offset of the argument; NULL if there is none that could be ruled."""
    cdef const char *name = <const char *>w.argument + offset
    if offset >= w.argument_bytes:
        return NULL
    length[0] = strnlen(name, w.argument_bytes - offset)
    return name if offset + length[0] < w.argument_bytes and 0 < length[0] <= MAX_NAME else NULL


# ---- names -------------------------------------------------------------------------------------------------------------

cdef int _answer_known(worker *w, message *m) noexcept nogil:
    """A reply with an entry that rules are about: note it, and let the kernel not trust it."""
    cdef uint64_t id = 0
    cdef int status
    if m.body_bytes >= sizeof(entry):
        id = (<entry *>m.body).node
        (<entry *>m.body).node_flags |= NODE_UNCACHED
        note_known(<special_state *>w.mount.rules, id, w.detour.vertex, w.detour.read_only)
    status = w.detour.answer(w, m)
    if status == -ENOENT and id != 0:   # the kernel did not take it
        forget_known(<special_state *>w.mount.rules, id, 1)
    return status


cdef void _begin_detour(worker *w, uint32_t vertex, bint read_only) noexcept nogil:
    w.detour.row = w.row[0]
    w.detour.serve = w.row.serve
    w.detour.answer = w.row.answer
    w.detour.vertex = vertex
    w.detour.read_only = read_only
    w.row = &w.detour.row


cdef void _expect_known(worker *w, uint32_t vertex, bint read_only) noexcept nogil:
    """The reply's entry is of a node that has to be noted, if there is anything to note."""
    cdef special_state *s = <special_state *>w.mount.rules
    cdef bint leads = vertex != 0 and s.vertices[vertex].leads
    cdef bint ruled = vertex != 0 and s.vertices[vertex].rule_count > 0
    if leads or ruled or read_only:     # ruled: tomorrow the process of that number may have another name
        _begin_detour(w, vertex if leads else <uint32_t>NOWHERE, read_only)
        w.detour.row.answer = _answer_known


cdef bint _serve_lookup(worker *w, const standing *at) noexcept nogil:
    cdef special_state *s = <special_state *>w.mount.rules
    cdef size_t length = 0
    cdef const char *name = _name(w, 0, &length)
    cdef uint32_t vertex = _step(s, at, name, length) if name != NULL else 0
    cdef int rule = _rule_of(s, vertex, name, length)
    cdef int action = s.rules[rule].action if rule != NO_RULE else NO_RULE
    if action == DO_HIDE:
        reply_error(w, ENOENT)
    elif action in (DO_LINK, DO_REPLACE):
        reply_made_entry(w, rule, name, length)
    else:
        _expect_known(w, vertex, (at.read_only or action == DO_PROTECT) and action != DO_RELAY)
        return False
    return True


cdef int _change_error(worker *w, const standing *at, size_t offset, bint makes) noexcept nogil:
    """Why the name at an offset of the argument cannot be made, or removed or renamed; 0 if rules do not mind."""
    cdef special_state *s = <special_state *>w.mount.rules
    cdef size_t length = 0
    cdef const char *name = _name(w, offset, &length)
    cdef uint32_t vertex
    cdef int rule, action
    if at.read_only:
        return EROFS
    if name == NULL:
        return 0
    vertex = _step(s, at, name, length)
    rule = _rule_of(s, vertex, name, length)
    if rule == NO_RULE:
        return 0
    action = s.rules[rule].action
    if action == DO_HIDE:
        return EACCES if makes else ENOENT
    if action in (DO_LINK, DO_REPLACE):
        return EEXIST if makes else EPERM
    return EROFS if action == DO_PROTECT else 0


cdef size_t _name_offset(uint32_t opcode) noexcept nogil:
    """Where the name lies in the argument of requests that make, remove or rename one."""
    if opcode == FUSE_MKNOD:
        return sizeof(fuse_mknod_in)
    if opcode == FUSE_MKDIR:
        return sizeof(fuse_mkdir_in)
    if opcode == FUSE_CREATE:
        return sizeof(fuse_create_in)
    if opcode == FUSE_LINK:
        return sizeof(fuse_link_in)
    if opcode == FUSE_RENAME:
        return sizeof(fuse_rename_in)
    return sizeof(fuse_rename2_in) if opcode == FUSE_RENAME2 else 0


cdef bint _makes(uint32_t opcode) noexcept nogil:
    return opcode in (FUSE_MKNOD, FUSE_MKDIR, FUSE_SYMLINK, FUSE_LINK, FUSE_CREATE)


cdef bint _serve_change(worker *w, const standing *at) noexcept nogil:
    """Making or removing a name in a directory that rules are about, or a rename out of it."""
    cdef size_t offset = _name_offset(w.request.opcode), length = 0
    cdef const char *name
    cdef int error = _change_error(w, at, offset, _makes(w.request.opcode))
    if error != 0:
        reply_error(w, error)
        return True
    name = _name(w, offset, &length)
    if name != NULL and _makes(w.request.opcode):
        _expect_known(w, _step(<special_state *>w.mount.rules, at, name, length), False)
    return False


cdef bint _serve_other_end(worker *w) noexcept nogil:
    """The second node of a rename or link."""
    cdef special_state *s = <special_state *>w.mount.rules
    cdef size_t offset = _name_offset(w.request.opcode), length = 0
    cdef uint64_t node = (<uint64_t *>w.argument)[0]     # fuse_rename_in, fuse_rename2_in, fuse_link_in begin with it
    cdef standing at
    cdef int error = 0
    if is_made(node):
        error = EPERM
    elif find_known(s, node, &at):
        if w.request.opcode == FUSE_LINK:
            error = EROFS if at.read_only else 0
        elif _name(w, offset, &length) != NULL:
            error = _change_error(w, &at, offset + length + 1, False)
    if error != 0:
        reply_error(w, error)
    return error != 0


# ---- directories -------------------------------------------------------------------------------------------------------

cdef bint _keep_record(worker *w, uint8_t *record, direntry *d) noexcept nogil:
    """Correct a directory's record by the rule of its name; False if it is hidden. `record`: direntry_plus, or NULL."""
    cdef special_state *s = <special_state *>w.mount.rules
    cdef const char *name = <const char *>(d + 1)
    cdef standing at
    cdef uint32_t vertex
    cdef int rule, action
    if name[0] == b'.' and (d.name_bytes == 1 or d.name_bytes == 2 and name[1] == b'.'):
        return True
    at.vertex = w.detour.vertex
    vertex = _step(s, &at, name, d.name_bytes)
    if vertex == 0 and not w.detour.read_only:
        return True
    # Names that are ruled, or lead there, have to be looked up.
    if record != NULL and (<entry *>record).node != 0:
        w.lookups += 1
        queue_forget(w.mount, (<entry *>record).node, 1)
        memset(record, 0, sizeof(entry))
    rule = _rule_of(s, vertex, name, d.name_bytes)
    action = s.rules[rule].action if rule != NO_RULE else NO_RULE
    if action == DO_LINK or action == DO_REPLACE:
        d.type = DT_LNK if action == DO_LINK else DT_REG
    return action != DO_HIDE


cdef bint _filter(worker *w, message *m, bint plus, uint64_t *last) noexcept nogil:
    """Leave hidden names out of a reply; False if it is malformed. `last` gets the offset behind its last record."""
    cdef size_t fixed = sizeof(direntry_plus) if plus else sizeof(direntry)
    cdef size_t at = 0, kept = 0, size
    cdef direntry *d
    cdef uint8_t *record
    while at < m.body_bytes:
        record = m.body + at
        d = <direntry *>(record + fixed - sizeof(direntry))
        if m.body_bytes - at < fixed or m.body_bytes - at < direntry_bytes(fixed, d.name_bytes):
            return False
        size = direntry_bytes(fixed, d.name_bytes)
        last[0] = d.off
        if _keep_record(w, record if plus else NULL, d):
            if kept != at:
                memmove(m.body + kept, record, size)
            kept += size
        at += size
    m.body_bytes = kept
    return True


cdef int _answer_listing(worker *w, message *m) noexcept nogil:
    """READDIR, READDIRPLUS. If nothing is left of a reply, the next is asked for: an empty one means the end."""
    cdef fuse_read_in *asked = <fuse_read_in *>w.argument
    cdef uint64_t last = 0
    cdef bint had_any = m.body_bytes > 0
    if m.body_bytes > asked.size or not _filter(w, m, w.request.opcode == FUSE_READDIRPLUS, &last):
        return reply_error(w, EIO)
    if had_any and m.body_bytes == 0:
        asked.offset = last
        w.detour.again = True
        return 0
    return w.detour.answer(w, m)


cdef void _serve_listing(worker *w) noexcept nogil:
    w.detour.again = True
    while w.detour.again:
        w.detour.again = False
        w.detour.serve(w)


cdef bint _prepare_listing(worker *w, const standing *at) noexcept nogil:
    if at.vertex == NOWHERE and not (at.read_only and w.request.opcode == FUSE_READDIRPLUS):
        return False
    _begin_detour(w, at.vertex, at.read_only)
    w.detour.row.serve = _serve_listing
    w.detour.row.answer = _answer_listing
    return False


# ---- all requests --------------------------------------------------------------------------------------------------------

cdef bint _changes(worker *w) noexcept nogil:
    """Whether a request wants to change the node it is for."""
    cdef uint32_t opcode = w.request.opcode
    cdef uint32_t flags
    if opcode == FUSE_OPEN:
        flags = (<fuse_open_in *>w.argument).flags
        return flags & O_ACCMODE != O_RDONLY or flags & O_TRUNC != 0
    if opcode == FUSE_ACCESS:
        return (<fuse_access_in *>w.argument).mask & W_OK != 0
    if opcode == FUSE_IOCTL:
        return (<fuse_ioctl_in *>w.argument).cmd in (SET_FLAGS, SET_FSXATTR)
    return True


cdef bint serve_special(worker *w) noexcept nogil:
    """Answer a request that rules decide about; or prepare it, and let it be served by its row: False."""
    cdef special_state *s = <special_state *>w.mount.rules
    cdef uint32_t opcode = w.request.opcode
    cdef standing at
    if opcode in (FUSE_FORGET, FUSE_BATCH_FORGET):
        return False
    if is_made(w.request.nodeid):
        return serve_made(w)
    if opcode in (FUSE_RENAME, FUSE_RENAME2, FUSE_LINK) and _serve_other_end(w):
        return True
    if opcode == FUSE_LOOKUP:
        return find_known(s, w.request.nodeid, &at) and _serve_lookup(w, &at)
    if opcode in (FUSE_READDIR, FUSE_READDIRPLUS):
        return find_known(s, w.request.nodeid, &at) and _prepare_listing(w, &at)
    if _makes(opcode) or opcode in (FUSE_UNLINK, FUSE_RMDIR, FUSE_RENAME, FUSE_RENAME2):
        return find_known(s, w.request.nodeid, &at) and _serve_change(w, &at)
    if opcode in (FUSE_OPEN, FUSE_SETATTR, FUSE_SETXATTR, FUSE_REMOVEXATTR, FUSE_ACCESS, FUSE_IOCTL, FUSE_TMPFILE) and \
            _changes(w) and find_known(s, w.request.nodeid, &at) and at.read_only:
        reply_error(w, EROFS)
        return True
    return False


# ---- rules -----------------------------------------------------------------------------------------------------------

_NUMBERS = {
    Action.REMOTE: DO_RELAY,
    Action.LOCAL: DO_LINK,
    Action.HIDE: DO_HIDE,
    Action.READONLY: DO_PROTECT,
    Action.REPLACE: DO_REPLACE,
}


cdef char *_copy(bytes text) except NULL:
    cdef char *copy = <char *>malloc(len(text) + 1)
    if copy == NULL:
        raise MemoryError
    memcpy(copy, <const char *>text, len(text) + 1)
    return copy


cdef class SpecialRules(MadeNodes):
    """The rules for what lies below a mount's source, and what is made by them. Of one mount."""

    def __cinit__(self):
        pthread_mutex_init(&self.s.guard, NULL)

    def __init__(self, rules, tree: PathTree, read_only_root: bool) -> None:
        """`tree` has the indexes of rules as marks."""
        super().__init__(rules)
        rows = tree.rows()
        self.s.read_only_root = read_only_root
        self.s.paths = trie_new(rows)
        self.s.rules_count = <uint32_t>len(rules)
        self.s.rules = <special_rule *>calloc(max(1, len(rules)), sizeof(special_rule))
        self.s.vertices = <special_vertex *>calloc(len(rows), sizeof(special_vertex))
        self.s.order = <uint32_t *>calloc(1 + sum([len(row.branch.marks) for row in rows]), sizeof(uint32_t))
        self.s.buckets = <known_node **>calloc(FEWEST_BUCKETS, sizeof(known_node *))
        self.s.bucket_mask = FEWEST_BUCKETS - 1
        if self.s.rules == NULL or self.s.vertices == NULL or self.s.order == NULL or self.s.buckets == NULL:
            raise MemoryError
        self._fill_rules()
        self._fill_vertices(rows)

    def __dealloc__(self):
        cdef uint32_t i
        cdef known_node *n
        for i in range(self.s.bucket_mask + 1 if self.s.buckets != NULL else 0):
            while self.s.buckets[i] != NULL:
                n = self.s.buckets[i]
                self.s.buckets[i] = n.next
                free(n)
        for i in range(self.s.file_room):
            free(self.s.files[i].data)
        for i in range(self.s.rules_count if self.s.rules != NULL else 0):
            free(self.s.rules[i].target)
            free(self.s.rules[i].commands)
        while self.s.productions != NULL:
            take_production(&self.s, self.s.productions.unique)
        free(self.s.buckets)
        free(self.s.files)
        free(self.s.rules)
        free(self.s.vertices)
        free(self.s.order)
        trie_free(self.s.paths)
        pthread_mutex_destroy(&self.s.guard)

    cdef int _fill_rules(self) except -1:
        cdef special_rule *out
        for index, rule in enumerate(self.rules):
            out = &self.s.rules[<uint32_t>index]
            out.action = _NUMBERS[rule.action]
            out.named = any(["{name}" in text for text in rule.texts])
            out.target = _copy(rule.target.encode("utf-8", "surrogateescape"))
            if rule.commands:
                out.commands = _copy(b"".join([name + b"\0" for name in rule.commands]))
        return 0

    cdef int _fill_vertices(self, list rows) except -1:
        cdef uint32_t at = 0
        cdef special_vertex *v
        for index, row in enumerate(rows):
            v = &self.s.vertices[<uint32_t>index]
            v.leads = bool(row.branch.children)
            v.first_rule = at
            for mark in sorted(set(row.branch.marks), reverse=True):
                self.s.order[at] = <uint32_t>mark
                at += 1
                if not self.rules[mark].is_conditional:
                    break
            v.rule_count = at - v.first_rule
        return 0

    cdef void attach(self, mount_state *m, object mount):
        """Put the rules into force on a mount, which keeps this object."""
        self.mount = weakref.ref(mount)
        m.rules = &self.s


def special_rules(rules, source: str) -> SpecialRules | None:
    """What has to be done on a mount of `source`; None if no rule is about anything in it. Raises QtfsError."""
    tree = PathTree()
    concerned = read_only_root = False
    for index, rule in enumerate(rules):
        below = rule.below(source.encode("utf-8", "surrogateescape"))
        if below:
            tree.add(below, index)
            concerned = True
        elif below is not None and rule.action in (Action.READONLY, Action.REMOTE):
            read_only_root = rule.action is Action.READONLY
    try:
        return SpecialRules(rules, tree, read_only_root) if concerned or read_only_root else None
    except ValueError as error:
        raise QtfsError(f"special rules: {error}") from error
