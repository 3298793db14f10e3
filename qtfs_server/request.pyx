"""Names and other text of a request body, checked and NUL-terminated."""
from libc.errno cimport EINVAL, ENAMETOOLONG
from libc.stdint cimport uint8_t
from libc.string cimport memchr, memcpy

from qtfs_common.protocol cimport MAX_NAME, name_is_valid


cdef int take_name(request *r, size_t offset, size_t length, char *out) noexcept nogil:
    """Copy one path component into `out` (MAX_NAME + 1 bytes). 0, -ENAMETOOLONG, -EINVAL, or MALFORMED."""
    if offset > r.body_bytes or length > r.body_bytes - offset:
        return MALFORMED
    if length > MAX_NAME:
        return -ENAMETOOLONG
    if not name_is_valid(r.body + offset, length):
        return -EINVAL
    memcpy(out, r.body + offset, length)
    out[length] = 0
    return 0


cdef int copy_text(request *r, size_t offset, size_t length, size_t limit, char *out) noexcept nogil:
    """Copy text without NUL into `out` (`limit` bytes, the NUL included). 0, -ENAMETOOLONG, -EINVAL, or MALFORMED."""
    if offset > r.body_bytes or length > r.body_bytes - offset:
        return MALFORMED
    if length >= limit:
        return -ENAMETOOLONG
    if length == 0 or memchr(r.body + offset, 0, length) != NULL:
        return -EINVAL
    memcpy(out, r.body + offset, length)
    out[length] = 0
    return 0
