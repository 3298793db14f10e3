"""A PathTree in C: what follows a path component by component without the GIL."""
from libc.stdint cimport uint8_t, uint32_t

cdef struct trie_vertex:
    uint8_t *name
    size_t name_bytes
    uint32_t first_child            # of those with names; 0: none, the root is never a child
    uint32_t next_sibling
    uint32_t any_child              # "*"
    uint32_t number_child           # "[pid]"

cdef struct trie:
    uint32_t count
    trie_vertex *vertices           # the root is 0

cdef trie *trie_new(list rows) except NULL
cdef void trie_free(trie *t) noexcept
cdef uint32_t trie_child(const trie *t, uint32_t parent, const uint8_t *name, size_t length) noexcept nogil
