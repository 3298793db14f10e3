"""Telling the kernel to look a name up again, which waits for who uses the directory, who may wait for us.

If we are killed meanwhile, everybody has to get on. So a process without our descriptors tells the kernel, on a clone of
the device: what the workers had read from theirs ends with those. The clone keeps the mount alive, though, and whoever
takes the directory next, or comes there for anything else, would wait for ever. So a second process, the guard, refuses
what comes, until the first one is done; then both are gone, and the mount with them.

Sources: fs/fuse/dev.c (fuse_dev_release), fs/fuse/dir.c (fuse_reverse_inval_entry), clone(2), pidfd_open(2).
"""
from libc.errno cimport ECONNABORTED
from libc.stdint cimport int64_t, uint8_t, uint64_t

from qtfs_client.drivers.apart cimport call_apart
from qtfs_client.drivers.fuse3.device cimport clone_device, expire_name, write_reply
from qtfs_client.drivers.fuse3.state cimport BUFFER_BYTES, mount_state
from qtfs_client.includes.fuse_abi cimport FUSE_BATCH_FORGET, FUSE_FORGET, FUSE_INTERRUPT, fuse_in_header
from qtfs_client.includes.linux cimport O_CLOEXEC, close, read
from qtfs_common.includes.mounts cimport syscall
from qtfs_common.includes.polling cimport POLLERR, POLLIN, poll, pollfd

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    """

cdef extern from "<sched.h>" nogil:
    enum:
        CLONE_VM
    int clone(int (*)(void *) noexcept nogil, void *, int, void *)

cdef extern from "<signal.h>" nogil:
    enum:
        SIGCHLD

cdef extern from "<sys/syscall.h>" nogil:
    enum:
        SYS_pidfd_open

cdef extern from "<sys/wait.h>" nogil:
    int waitpid(int, int *, int)

cdef extern from "<unistd.h>" nogil:
    int pipe2(int *, int)

cdef enum:
    STACK_BYTES = 16384             # of who tells the kernel

cdef struct notice:
    mount_state *mount
    int device                      # a clone
    int alive                       # a pipe, whose other end only the daemon has
    uint64_t directory
    const char *name
    size_t name_bytes


cdef void _refuse(const notice *what) noexcept nogil:
    """Answer one request. The buffer is the daemon's, which is dead."""
    cdef fuse_in_header *request = <fuse_in_header *>what.mount.triage_buffer
    if read(what.device, request, BUFFER_BYTES) >= <ssize_t>sizeof(fuse_in_header) and \
            request.opcode not in (FUSE_FORGET, FUSE_BATCH_FORGET, FUSE_INTERRUPT):
        write_reply(what.device, request.unique, -ECONNABORTED, NULL, 0, NULL, 0)


cdef void _guard(const notice *what, int teller) noexcept nogil:
    """Wait until another process has told the kernel; if the daemon ends before, refuse whatever comes until then."""
    cdef pollfd fds[2]
    fds[0].fd = <int>syscall(SYS_pidfd_open, <int64_t>teller, <int64_t>0)
    fds[0].events = POLLIN
    fds[1].fd = what.alive
    fds[1].events = 0
    fds[0].revents = 0
    while fds[0].fd >= 0 and fds[0].revents == 0:
        fds[1].revents = 0
        poll(fds, 2, -1)
        if fds[1].fd == what.alive and fds[1].revents:
            fds[1].fd = what.device
            fds[1].events = POLLIN
        elif fds[1].revents & POLLERR:
            fds[1].fd = -1          # the mount has been ended by somebody
        elif fds[1].revents:
            _refuse(what)
    waitpid(teller, NULL, 0)


cdef int _tell_kernel(void *argument) noexcept nogil:
    cdef notice *what = <notice *>argument
    expire_name(what.mount, what.device, what.directory, what.name, what.name_bytes)
    return 0


cdef void _tell_guarded(void *argument) noexcept nogil:
    """Start who tells the kernel, in memory that is ours until he has ended, and guard the mount meanwhile.

    By clone(2), since fork(3) takes locks and copies page tables.
    """
    cdef uint8_t stack[STACK_BYTES]
    cdef uint8_t *top = stack + STACK_BYTES - <size_t>(stack + STACK_BYTES) % 16
    cdef int teller = clone(_tell_kernel, top, CLONE_VM | SIGCHLD, argument)
    if teller > 0:
        _guard(<notice *>argument, teller)
    else:
        _tell_kernel(argument)


cdef void expire_name_apart(mount_state *m, uint64_t directory, const char *name, size_t name_bytes) noexcept nogil:
    """device.expire_name by other processes. If they cannot be had, by ourselves."""
    cdef notice what
    cdef int ends[2]
    cdef int status = -1
    what.mount = m
    what.directory = directory
    what.name = name
    what.name_bytes = name_bytes
    what.device = clone_device(m.device)
    if pipe2(ends, O_CLOEXEC) == 0:
        what.alive = ends[0]
        if what.device >= 0:
            status = call_apart(_tell_guarded, &what, what.device, what.alive)
        close(ends[0])
        close(ends[1])
    if what.device >= 0:
        close(what.device)
    if status < 0:
        expire_name(m, m.device, directory, name, name_bytes)
