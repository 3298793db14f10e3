"""Operations on open files."""
from qtfs_common.protocol cimport write_request
from qtfs_server.request cimport request
from qtfs_server.session cimport handle

cdef int op_open(request *r) noexcept nogil
cdef int op_create(request *r) noexcept nogil
cdef int op_tmpfile(request *r) noexcept nogil
cdef int op_read(request *r) noexcept nogil
cdef int op_write(request *r) noexcept nogil
cdef int hold_for_early_write(request *r, const write_request *body, handle **out) noexcept nogil
cdef int op_release(request *r) noexcept nogil
cdef int op_flush(request *r) noexcept nogil
cdef int op_fsync(request *r) noexcept nogil
cdef int op_fallocate(request *r) noexcept nogil
cdef int op_lseek(request *r) noexcept nogil
cdef int op_copy_file_range(request *r) noexcept nogil
cdef int op_ioctl(request *r) noexcept nogil
