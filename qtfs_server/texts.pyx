"""Paths of nodes that no file handle opens, in a table of the session's state file: chains of cells of one size."""
from libc.stdint cimport uint32_t
from libc.string cimport memchr, memcpy, strlen

from qtfs_server.session cimport NO_INDEX, session
from qtfs_server.state_file cimport TEXTS, TEXT_BYTES, grow, text_cell


cdef uint32_t _cell_locked(session *s) noexcept nogil:
    """The index of an unused cell, or NO_INDEX."""
    cdef uint32_t index = s.text_free
    if index != NO_INDEX:
        s.text_free = s.texts[index].next
        return index
    if grow(s.state_fd, s.state, TEXTS, s.text_count) < 0:
        return NO_INDEX
    s.text_count += 1
    return s.text_count - 1


cdef uint32_t text_new_locked(session *s, const char *text) noexcept nogil:
    """Keep a text. What it is called from now on, or NO_INDEX: there is no room."""
    cdef size_t left = strlen(text) + 1, piece
    cdef uint32_t first = NO_INDEX, index
    cdef uint32_t *link = &first
    while left > 0:
        index = _cell_locked(s)
        if index == NO_INDEX:
            text_free_locked(s, first)
            return NO_INDEX
        piece = min(left, <size_t>TEXT_BYTES)
        memcpy(s.texts[index].text, text, piece)
        s.texts[index].next = NO_INDEX
        link[0] = index
        link = &s.texts[index].next
        text += piece
        left -= piece
    return first


cdef void text_free_locked(session *s, uint32_t text) noexcept nogil:
    """Forget a text; NO_INDEX is none."""
    cdef uint32_t following
    while text != NO_INDEX:
        following = s.texts[text].next
        s.texts[text].next = s.text_free
        s.text_free = text
        text = following


cdef size_t text_copy(const session *s, uint32_t text, char *out, size_t room) noexcept nogil:
    """Put a text together. Its length, or 0: there is none, or it does not fit."""
    cdef size_t at = 0
    while text != NO_INDEX and text < s.text_count and at + TEXT_BYTES <= room:
        memcpy(out + at, s.texts[text].text, TEXT_BYTES)
        if memchr(out + at, 0, TEXT_BYTES) != NULL:
            return strlen(out)
        at += TEXT_BYTES
        text = s.texts[text].next
    return 0
