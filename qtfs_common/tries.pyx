"""A PathTree in C: vertices are numbered as PathTree.rows has them, so that their owners keep arrays of what they mean."""
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

from qtfs_common.pathtree import ANY, NUMBER

cdef enum:
    LONGEST_NUMBER = 10             # pathtree.is_number


cdef bint _is_number(const uint8_t *name, size_t length) noexcept nogil:
    cdef size_t i
    if length == 0 or length > LONGEST_NUMBER or name[0] == b'0' and length > 1:
        return False
    for i in range(length):
        if name[i] < b'0' or name[i] > b'9':
            return False
    return True


cdef uint32_t trie_child(const trie *t, uint32_t parent, const uint8_t *name, size_t length) noexcept nogil:
    """The vertex of `name` below `parent`: its own, else that of a pattern it matches; 0 if there is none."""
    cdef const trie_vertex *at = &t.vertices[parent]
    cdef uint32_t child = at.first_child
    while child != 0:
        if t.vertices[child].name_bytes == length and memcmp(t.vertices[child].name, name, length) == 0:
            return child
        child = t.vertices[child].next_sibling
    if at.number_child != 0 and _is_number(name, length):
        return at.number_child
    return at.any_child


cdef int _add(trie *t, uint32_t index, uint32_t parent, bytes name) except -1:
    cdef trie_vertex *v = &t.vertices[index]
    cdef trie_vertex *above = &t.vertices[parent]
    if name == ANY:
        above.any_child = index
    elif name == NUMBER:
        above.number_child = index
    else:
        v.name = <uint8_t *>malloc(max(1, len(name)))
        if v.name == NULL:
            raise MemoryError
        memcpy(v.name, <const char *>name, len(name))
        v.name_bytes = len(name)
        v.next_sibling = above.first_child
        above.first_child = index
    return 0


cdef trie *trie_new(list rows) except NULL:
    """The trie of PathTree.rows()."""
    cdef trie *t = <trie *>calloc(1, sizeof(trie))
    cdef uint32_t index
    if t == NULL:
        raise MemoryError
    t.vertices = <trie_vertex *>calloc(len(rows), sizeof(trie_vertex))
    if t.vertices == NULL:
        free(t)
        raise MemoryError
    for index in range(1, <uint32_t>len(rows)):
        _add(t, index, rows[index].parent, rows[index].name)
    t.count = <uint32_t>len(rows)
    return t


cdef void trie_free(trie *t) noexcept:
    """Free what trie_new made; NULL is none."""
    cdef uint32_t i
    if t == NULL:
        return
    for i in range(t.count):
        free(t.vertices[i].name)
    free(t.vertices)
    free(t)
