"""POSIX locks of a session in a table of its state file: an owner and the ranges that it holds of one file.

The ranges of an owner are written anew with each change and a serial number of their own. What counts is the owner's
serial number, which is written last: so an engine that dies leaves the ranges of before or those of after.
"""
from libc.stdint cimport uint32_t, uint64_t

from qtfs_server.includes.linux cimport pthread_mutex_lock, pthread_mutex_unlock, written
from qtfs_server.lock_ranges cimport held_range, held_ranges
from qtfs_server.session cimport NO_INDEX, lock_note, session
from qtfs_server.state_file cimport LOCK_NOTES, grow


cdef uint32_t _new_note_locked(session *s) noexcept nogil:
    """The index of an unused note, or NO_INDEX."""
    cdef uint32_t index = s.lock_note_free
    if index != NO_INDEX:
        s.lock_note_free = s.lock_notes[index].next
        return index
    if grow(s.state_fd, s.state, LOCK_NOTES, s.lock_note_count) < 0:
        return NO_INDEX
    s.lock_note_count += 1
    return s.lock_note_count - 1


cdef void _free_chain_locked(session *s, uint32_t index) noexcept nogil:
    cdef uint32_t following
    while index != NO_INDEX:
        following = s.lock_notes[index].next
        s.lock_notes[index].used = False
        s.lock_notes[index].next = s.lock_note_free
        s.lock_note_free = index
        index = following


cdef uint32_t _note_owner_locked(session *s, uint64_t owner, uint64_t handle) noexcept nogil:
    cdef uint32_t index = _new_note_locked(s)
    cdef lock_note *n
    if index == NO_INDEX:
        return NO_INDEX
    n = &s.lock_notes[index]
    n.serial = 0
    n.owner = owner
    n.handle = handle
    n.of = NO_INDEX
    n.next = NO_INDEX
    written()
    n.used = True
    return index


cdef void note_ranges(session *s, uint32_t *note, uint64_t owner, uint64_t handle, const held_ranges *ranges) noexcept nogil:
    """Note what an owner holds now; `note` is its index, NO_INDEX at first. Without room a lock ends with this engine."""
    cdef const held_range *range = ranges.first
    cdef uint32_t first = NO_INDEX, index, old
    cdef lock_note *n
    pthread_mutex_lock(&s.guard)
    if note[0] == NO_INDEX:
        note[0] = _note_owner_locked(s, owner, handle)
    s.lock_serial += 1
    while range != NULL and note[0] != NO_INDEX:
        index = _new_note_locked(s)
        if index == NO_INDEX:
            break
        n = &s.lock_notes[index]
        n.serial = s.lock_serial
        n.start = range.start
        n.end = range.end
        n.type = range.type
        n.of = note[0]
        n.next = first
        n.used = True
        first = index
        range = range.next
    if note[0] != NO_INDEX:
        old = s.lock_notes[note[0]].next
        written()
        s.lock_notes[note[0]].serial = s.lock_serial
        s.lock_notes[note[0]].next = first
        _free_chain_locked(s, old)
    pthread_mutex_unlock(&s.guard)


cdef void drop_note(session *s, uint32_t note) noexcept nogil:
    """Forget an owner and its ranges; NO_INDEX is none."""
    cdef uint32_t ranges
    if note == NO_INDEX:
        return
    pthread_mutex_lock(&s.guard)
    ranges = s.lock_notes[note].next
    s.lock_notes[note].used = False
    s.lock_notes[note].next = NO_INDEX
    _free_chain_locked(s, note)
    _free_chain_locked(s, ranges)
    pthread_mutex_unlock(&s.guard)
