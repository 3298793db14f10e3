"""What the kernel's request does not say about its caller: /proc/PID/status does, proc(5).

The caller sleeps in the very request that is being translated, so what is read here is what was in force when it asked.
`pid` is the thread's id, in the pid namespace of the mount; 0 where the caller is outside of that.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport strcmp, strlen

from qtfs_client.includes.linux cimport O_ACCMODE, O_CLOEXEC, O_PATH, O_RDONLY, O_WRONLY, R_OK, W_OK, close, open, \
    openat, read, snprintf, strstr, strtoul, strtoull

cdef extern from *:
    """
    #include <sys/syscall.h>
    #ifndef SYS_open                    /* newer architectures have openat alone */
    #define SYS_open SYS_openat
    #endif
    """
    enum:
        SYS_open
        SYS_openat
        SYS_openat2

cdef enum:
    STATUS_BYTES = 16384            # 1024 groups of ten digits and all the rest

# Signals whose default is to be ignored or to stop: CHLD, CONT, STOP, TSTP, TTIN, TTOU, URG, WINCH; signal(7)
cdef uint64_t HARMLESS = (1 << 16 | 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 22 | 1 << 27)


# Of the pid namespace that the requests' pids are of; mount.qtfs -N may enter another mount namespace later.
cdef int _proc = open("/proc", O_PATH | O_CLOEXEC)


cdef bint _read_status(uint32_t pid, char *text) noexcept nogil:
    """Read /proc/PID/status, at most STATUS_BYTES - 1 bytes of it. False if there is none."""
    cdef char path[32]
    cdef ssize_t got
    snprintf(path, sizeof(path), "%u/status", pid)
    cdef int fd = openat(_proc, path, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return False
    got = read(fd, text, STATUS_BYTES - 1)     # it comes whole, or not at all
    close(fd)
    text[max(got, 0)] = 0
    return True


cdef int caller_groups(uint32_t pid, uint32_t *groups, int room) noexcept nogil:
    """Supplementary groups of a thread, at most `room`: how many. None if it cannot be seen."""
    cdef char text[STATUS_BYTES]
    cdef char *at
    cdef char *end = NULL
    cdef int count = 0
    if pid == 0 or not _read_status(pid, text):
        return 0
    at = strstr(text, "\nGroups:")
    if at == NULL:
        return 0
    at += strlen("\nGroups:")
    while count < room:
        while at[0] == b' ' or at[0] == b'\t':
            at += 1
        if at[0] < b'0' or at[0] > b'9':
            break
        groups[count] = <uint32_t>strtoul(at, &end, 10)
        at = end
        count += 1
    return count


cdef uint32_t caller_process(uint32_t pid) noexcept nogil:
    """The process that a thread belongs to; 0 if it cannot be seen."""
    cdef char text[STATUS_BYTES]
    cdef char *at
    if pid == 0 or not _read_status(pid, text):
        return 0
    at = strstr(text, "\nTgid:")
    return 0 if at == NULL else <uint32_t>strtoul(at + strlen("\nTgid:"), NULL, 10)


cdef bint process_is_called(uint64_t pid, const char *names) noexcept nogil:
    """Whether a process of this machine has one of the names, each with its NUL, an empty one at the end: proc_pid_comm(5)."""
    cdef char path[40]
    cdef char text[64]
    cdef ssize_t got
    cdef int fd
    snprintf(path, sizeof(path), "%llu/comm", <unsigned long long>pid)
    fd = openat(_proc, path, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return False
    got = read(fd, text, sizeof(text) - 1)
    close(fd)
    if got <= 1:
        return False
    text[got - 1] = 0                   # the line feed
    while names[0]:
        if strcmp(names, text) == 0:
            return True
        names += strlen(names) + 1
    return False


cdef int caller_opens(uint32_t pid) noexcept nogil:
    """What the system call that a thread sleeps in wants of the file that it opens: R_OK | W_OK; 0: it opens nothing.

    /proc/PID/syscall: the call's number and six arguments, proc(5). Calls of 32-bit programs have other numbers.
    """
    cdef char path[32]
    cdef char text[256]
    cdef char *at = text
    cdef unsigned long call[4]
    cdef ssize_t got
    cdef int fd, i
    snprintf(path, sizeof(path), "%u/syscall", pid)
    fd = openat(_proc, path, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return 0
    got = read(fd, text, sizeof(text) - 1)
    close(fd)
    text[max(got, 0)] = 0
    for i in range(4):
        call[i] = strtoul(at, &at, 0)
    if got <= 0 or text[0] < b'0' or text[0] > b'9':
        return 0                        # "running"
    if call[0] == <unsigned long>SYS_openat:
        return _access_of(call[3])
    if call[0] == <unsigned long>SYS_openat2:
        return R_OK | W_OK              # its flags are in the caller's memory, which may make us wait for ever
    return _access_of(call[2]) if call[0] == <unsigned long>SYS_open else 0


cdef int _access_of(unsigned long flags) noexcept nogil:
    cdef unsigned long mode = flags & O_ACCMODE
    if flags & O_PATH:
        return 0
    return R_OK if mode == O_RDONLY else W_OK if mode == O_WRONLY else R_OK | W_OK


cdef uint64_t _mask(const char *text, const char *key) noexcept nogil:
    """A signal set of the status file; 0 if it is not there."""
    cdef const char *at = strstr(text, key)
    return 0 if at == NULL else <uint64_t>strtoull(at + strlen(key), NULL, 16)


cdef uint64_t _deliverable(const char *text) noexcept nogil:
    """Signals that wait for the thread or its process, and are not blocked."""
    return (_mask(text, "\nSigPnd:") | _mask(text, "\nShdPnd:")) & ~_mask(text, "\nSigBlk:")


cdef bint caught_signal_pending(uint32_t pid) noexcept nogil:
    """Whether a handler will run once its system call returns; not for stop signals, tracers and freezers."""
    cdef char text[STATUS_BYTES]
    if pid == 0 or not _read_status(pid, text):
        return True
    return _deliverable(text) & _mask(text, "\nSigCgt:") != 0


cdef bint fatal_signal_pending(uint32_t pid) noexcept nogil:
    """Whether the thread will die of a signal once its system call returns: then nobody waits for the result."""
    cdef char text[STATUS_BYTES]
    if pid == 0 or not _read_status(pid, text):
        return False
    return _deliverable(text) & ~(_mask(text, "\nSigIgn:") | _mask(text, "\nSigCgt:") | HARMLESS) != 0
