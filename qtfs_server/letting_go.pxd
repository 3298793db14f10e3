"""Letting the server's mounts go."""
cdef bint let_idle_go() noexcept nogil
