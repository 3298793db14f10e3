"""What the kernel's request does not say about its caller: /proc/PID/status does, proc(5).

The caller sleeps in the very request that is being translated, so what is read here is what was in force when it asked.
`pid` is the thread's id, in the pid namespace of the mount; 0 where the caller is outside of that.

Whoever reads must not wait for what the caller holds, since that waits for us:

- A caller in execve(2) holds its exec_update_lock for writing from the moment when it has the new memory until all
  close-on-exec files are closed (exec_mmap, begin_new_exec, setup_new_exec in fs/exec.c): thus while it waits for our
  answer to a FLUSH, or for pages of its old memory to be written. /proc/PID/syscall takes that lock, as wchan,
  environ, links of fd and others do, and stat since 2026 (6.18.40; fs/proc/base.c, array.c). So `_read_syscall` is
  for LOOKUP alone: under that lock nobody looks a name up, and another thread of the process cannot be so far in
  execve(2), because it waits for the death of all others first (de_thread). It is read after `hand_over`, as it may
  take its time: somebody else reads the device.
- /proc/PID/status and comm take none but spin locks, and no ptrace_may_access. status takes a reference to the
  caller's memory. If that were the last one, to give it back would write the caller's mapped files, here (exit_mmap,
  fuse_vma_close); but a caller that waits for us has one of its own, or at its exit none is taken. Where it may have
  gone meanwhile (an OPEN that another thread answers) it is read after `hand_over`, too.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport strcmp, strlen

from qtfs_client.includes.linux cimport O_ACCMODE, O_CLOEXEC, O_PATH, O_RDONLY, O_RDWR, O_WRONLY, R_OK, W_OK, close, open, \
    openat, read, snprintf, strstr, strtoul, strtoull
from qtfs_common.protocol cimport NODE_STREAM_READER, NODE_STREAM_WRITER

cdef extern from *:
    """
    #include <signal.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #ifndef SYS_open                    /* newer architectures have openat alone */
    #define SYS_open SYS_openat
    #define SYS_creat SYS_openat
    #endif
    #ifdef __x86_64__                   /* i386 numbers; in ours they mean fstat, preadv and lseek, which walk no path */
    enum { COMPAT_open = 5, COMPAT_openat = 295, COMPAT_creat = 8 };
    #else
    enum { COMPAT_open = SYS_open, COMPAT_openat = SYS_openat, COMPAT_creat = SYS_creat };
    #endif
    """
    enum:
        COMPAT_open
        COMPAT_openat
        COMPAT_creat
        SIGPIPE
        SYS_acct
        SYS_creat
        SYS_io_uring_enter
        SYS_mount
        SYS_open
        SYS_open_tree
        SYS_openat
        SYS_openat2
        SYS_swapon
        SYS_tkill
    long syscall(long, ...) nogil

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int)

cdef enum:
    STATUS_BYTES = 16384            # 1024 groups of ten digits and all the rest
    # A caller that has sent its request may not be asleep yet: looked at so often, then once a millisecond, so often.
    QUICK_LOOKS = 10
    SLOW_LOOKS = 1000

# Signals whose default is to be ignored or to stop: CHLD, CONT, STOP, TSTP, TTIN, TTOU, URG, WINCH; signal(7)
cdef uint64_t HARMLESS = (1 << 16 | 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 22 | 1 << 27)

cdef uint64_t STOPPING = (1 << 18 | 1 << 19 | 1 << 20 | 1 << 21)     # STOP, TSTP, TTIN, TTOU

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


cdef bint _read_syscall(uint32_t pid, char *text, size_t size) noexcept nogil:
    """Read /proc/PID/syscall. False if there is nothing to be read. Only of a caller that looks a name up: see above."""
    cdef char path[32]
    cdef ssize_t got
    snprintf(path, sizeof(path), "%u/syscall", pid)
    cdef int fd = openat(_proc, path, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return False
    got = read(fd, text, size - 1)
    close(fd)
    text[max(got, 0)] = 0
    return got > 0


cdef bint _read_call(uint32_t pid, unsigned long *call) noexcept nogil:
    """The system call that a thread sleeps in: its number and first four arguments. False: that cannot be seen.

    proc_pid_syscall(5). A thread that has lost its processor between asking and falling asleep is "running" still.
    """
    cdef char text[256]
    cdef char *at = text
    cdef int looks, i
    for looks in range(QUICK_LOOKS + SLOW_LOOKS):
        if not _read_syscall(pid, text, sizeof(text)):
            return False
        if text[0] != b'r':
            break
        if looks < QUICK_LOOKS:
            sched_yield()
        else:
            usleep(1000)
    if text[0] < b'0' or text[0] > b'9':
        return False                    # still "running", or it sleeps outside of a system call: "-1"
    for i in range(5):
        call[i] = strtoul(at, &at, 0)
    return True


cdef long _open_flags(const unsigned long *call) noexcept nogil:
    """The open(2) flags of a system call that opens a path; O_RDWR if they lie in its memory; -1: it opens none."""
    if call[0] == <unsigned long>SYS_openat or call[0] == <unsigned long>COMPAT_openat:
        return <long>call[3]
    if call[0] == <unsigned long>SYS_open or call[0] == <unsigned long>COMPAT_open:
        return <long>call[2]
    if call[0] in (<unsigned long>SYS_openat2, <unsigned long>SYS_creat, <unsigned long>COMPAT_creat,
                   <unsigned long>SYS_mount, <unsigned long>SYS_open_tree, <unsigned long>SYS_io_uring_enter,
                   <unsigned long>SYS_swapon, <unsigned long>SYS_acct):
        return O_RDWR
    return -1


cdef int caller_opens(uint32_t pid) noexcept nogil:
    """What the system call that a thread sleeps in wants of the file that it opens: R_OK | W_OK; 0: it opens nothing."""
    cdef unsigned long call[5]
    cdef long flags = _open_flags(call) if _read_call(pid, call) else -1
    if flags < 0 or flags & O_PATH:
        return 0
    return R_OK if flags & O_ACCMODE == O_RDONLY else W_OK if flags & O_ACCMODE == O_WRONLY else R_OK | W_OK


cdef uint64_t caller_alias(uint32_t pid) noexcept nogil:
    """NODE_STREAM_* if a thread looks a name up in order to open it, also with O_PATH, or to mount it; else 0."""
    cdef unsigned long call[5]
    cdef long flags = _open_flags(call) if _read_call(pid, call) else -1
    if flags < 0:
        return 0
    return NODE_STREAM_READER if flags & O_ACCMODE == O_RDONLY else NODE_STREAM_WRITER


def wants_to_open(uint32_t pid) -> bool:
    """Whether a thread looks a name up in order to open it."""
    return caller_alias(pid) != 0


cdef bint callers_can_be_seen() noexcept nogil:
    """Whether this kernel tells, and tells us, what system call a thread is in."""
    cdef char text[8]
    cdef int fd = openat(_proc, "self/syscall", O_RDONLY | O_CLOEXEC)
    cdef ssize_t got = read(fd, text, sizeof(text)) if fd >= 0 else -1
    if fd >= 0:
        close(fd)
    return got > 0


cdef void kill_by_broken_pipe(uint32_t pid) noexcept nogil:
    """SIGPIPE to a thread whose write(2), which it still sleeps in, fails with EPIPE: pipe(7). FUSE does not send it."""
    if pid != 0:
        syscall(SYS_tkill, <int>pid, SIGPIPE)


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


cdef bint signal_wants_out(uint32_t pid) noexcept nogil:
    """Whether a thread has something else to do than wait: a handler to run, or to stop, which it cannot as it is."""
    cdef char text[STATUS_BYTES]
    if pid == 0 or not _read_status(pid, text):
        return True
    return _deliverable(text) & (_mask(text, "\nSigCgt:") | STOPPING & ~_mask(text, "\nSigIgn:")) != 0


cdef bint fatal_signal_pending(uint32_t pid) noexcept nogil:
    """Whether the thread will die of a signal once its system call returns: then nobody waits for the result."""
    cdef char text[STATUS_BYTES]
    if pid == 0 or not _read_status(pid, text):
        return False
    return _deliverable(text) & ~(_mask(text, "\nSigIgn:") | _mask(text, "\nSigCgt:") | HARMLESS) != 0


cdef bint is_exiting(uint32_t pid) noexcept nogil:
    """Whether a process has given its memory back already and is closing its files: proc_pid_status(5) shows no VmSize.

    No signal reaches it then, and it does not look at what close(2) returns.
    """
    cdef char text[STATUS_BYTES]
    if pid == 0 or not _read_status(pid, text):
        return False
    return strstr(text, "\nSigQ:") != NULL and strstr(text, "\nVmSize:") == NULL
