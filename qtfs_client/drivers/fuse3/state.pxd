"""What the threads of one mount share, and what belongs to one of them.

Threads: *workers*, each with a slot channel of its own for life; the *event* thread, which owns the event channel and
reads the device while every worker is busy (triage); the *manager*, in Python, which starts workers and reconnects
channels. Workers and the event thread run without the GIL from their first request to their last.

Lock order: mount_state.guard, then nothing. It is never held over a system call that can block. Fields marked
*atomic* are read and written without it, through the functions of includes/linux.pxd.

A connection that breaks changes hands: its owner sets line.link to LINK_LOST and touches it no more; the manager puts
a fresh channel in line.fresh and sets LINK_READY; the owner takes it and sets LINK_UP.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from qtfs_client.includes.fuse_abi cimport fuse_in_header
from qtfs_client.includes.linux cimport pthread_mutex_t
from qtfs_common.pipes cimport splice_pipe
from qtfs_common.protocol cimport MAX_RELEASES, MAX_SLOTS, attributes_reply, forget_item, statfs_reply
from qtfs_common.spinning cimport spinner
from qtfs_common.transport cimport channel, message

cdef enum:
    MAX_IDLE = 1                    # workers that wait for the kernel; the others park
    BACKLOG = 8                     # requests found waiting one after the other: one worker is not enough, if there are processors
    REQUEST_PAYLOAD = 1 << 20       # largest WRITE and READ that INIT offers
    BUFFER_BYTES = REQUEST_PAYLOAD + 8192
    CAUGHT_SIGNAL_US = 2000000      # how long a caller that caught a signal still waits for success
    MEMORY_US = 2000000             # how long GETATTR and STATFS of the root wait if their last answer is known
    PENDING_REQUESTS = 4096         # set aside while all workers are busy
    PENDING_BYTES = 64 << 20
    FORGETS_AT_ONCE = 2048          # in one FORGET message
    MAX_CHANGES = 1024              # MOUNTS_CHANGED kept; what comes beyond them would wait for the same
    MAX_CHANGE_BYTES = 65536        # of one; a longer one is kept without its names
    HANDLE_WRITABLE = 1             # bits of a handle: it is open for writing
    HANDLE_POLLABLE = 2             # POLL has something to say
    MAX_FORGETS = 1 << 20           # kept for sending; more are dropped, and the server's LRU has to do

cdef enum cache_mode:
    CACHE_NONE
    CACHE_AUTO
    CACHE_ALWAYS

cdef enum:                          # line.link
    LINK_UP
    LINK_LOST
    LINK_READY

cdef struct line:                   # a channel that is replaced when it breaks
    channel *ch
    int32_t link                    # atomic
    int wake_fd                     # eventfd: look at link, at interrupts, at being parked
    uint32_t epoch                  # counts the sessions of this mount: of the session that ch belongs to
    channel *fresh
    uint64_t fresh_sequence         # the last one the server executed
    uint32_t fresh_epoch

cdef enum:                          # worker.phase: how far the message under way has come
    PHASE_BUILD
    PHASE_SEND
    PHASE_SENT

ctypedef int (*builder)(worker *) noexcept nogil            # put a request together: 0, or -errno to answer at once
ctypedef void (*server)(worker *) noexcept nogil            # do all that a request needs
ctypedef int (*replier)(worker *, message *) noexcept nogil # hand a reply to the kernel: 0, or -errno of the device

cdef enum:                          # operation_row.flags
    REPEATABLE = 1                  # may be executed twice
    MAKES_ENTRY = 2                 # the reply counts a lookup
    MAKES_HANDLE = 4                # the reply opens a handle
    MAKES_ENTRIES = 8               # READDIRPLUS
    BY_HANDLE = 16                  # allowed to everybody who got hold of a descriptor (allow_root)
    ENOSYS_MEANT = 32               # the kernel may remember ENOSYS for good
    MUST_ARRIVE = 64                # the server has to be told, even if the kernel has been answered: locks end with it

cdef struct operation_row:          # one FUSE opcode
    server serve
    builder build
    replier answer
    uint32_t least_bytes            # of the argument
    uint32_t reply_bytes            # of the server's reply, where it is fixed
    uint32_t flags

cdef struct detour:                 # worker.detour: a request that special rules have a part in, see special.pyx
    operation_row row               # the opcode's own but for what is put in place of these two
    server serve
    replier answer
    uint32_t vertex                 # of the directory listed, or of the name looked up
    bint read_only
    bint again                      # the reply held nothing but hidden names

cdef struct worker:
    mount_state *mount
    uint32_t slot
    line link
    worker *next_parked
    bint parked                     # under guard
    # the kernel's request
    uint8_t *memory                 # what buffer lies in
    uint8_t *buffer                 # placed so that the data of a WRITE begins on a page
    fuse_in_header *request         # = buffer
    uint8_t *argument
    size_t argument_bytes
    int device                      # the descriptor it was read from, which takes the reply
    uint8_t *placed                 # the rest of a WRITE's data, if it lies in the channel (placing.pyx)
    size_t placed_bytes
    bint placed_sent                # it has gone out from there
    bint data_lost                  # it could not be brought into the buffer any more
    bint keeps_data                 # the kernel could not read it into the channel
    const operation_row *row
    detour detour
    uint64_t current                # atomic: its unique while an INTERRUPT can find it here, else 0
    uint64_t interrupted            # atomic: the unique that an INTERRUPT named last
    int64_t since_us                # when it was read
    int64_t interrupted_us          # when that was first seen to be named by an INTERRUPT; 0: it is not
    bint answered                   # the kernel has its answer, or somebody else has the request; what still comes from
                                    # the server is undone
    int64_t delay_us                # how long it was put off last; 0: never
    # the message to the server
    int phase
    uint64_t sequence
    bint begun                      # bytes of the request may have reached the server under this sequence number
    bint executed                   # the server said that it accepted this sequence number; the reply is still owed
    uint16_t asked_op               # what the reply has to be about
    uint8_t *room                   # where it is built, in the channel
    size_t message_bytes            # without the payload
    const uint8_t *payload
    size_t payload_bytes
    size_t payload_placed           # behind those, where `placed` is
    splice_pipe pipe                # where the reply goes on its way to the kernel, if it is a long one (piping.pyx)
    size_t piped_bytes              # so much there will be in it when it is whole; 0: it goes another way
    size_t most_piped               # so much of what this channel brings a pipe does not hold; 0: unknown
    bint repeatable                 # it may be executed twice
    bint own                        # no caller waits for it
    int attempts
    int64_t paused_until_us         # the next one waits so long
    int64_t asked_us
    uint64_t asked_node             # what build_special_access asks about
    uint32_t asked_mask
    uint64_t undo_handle            # what build_undo_release sends
    bint undo_directory
    int32_t breaks_seen             # mount_state.breaks when the channel was last found whole
    int32_t renewals_seen           # mount_state.renewals when something last came over it
    int64_t suspect_us              # since when the reply has been awaited over a channel that may be dead; 0: it is not
    forget_item *forgotten          # what a FORGET under way gives back; room for FORGETS_AT_ONCE
    size_t forgotten_count
    uint64_t released[MAX_RELEASES] # what a RELEASE under way ends that nobody waits for
    size_t released_count
    bint releases_due               # there was no request while we looked
    bint serving                    # counted in mount_state.serving
    bint owes                       # nobody has read the device since it took its request
    int backlog                     # how many requests in a row were there before it asked for one
    # figures, for whoever asks; nobody else writes them
    uint64_t requests               # that it was given by the kernel
    uint64_t lookups                # that the server granted in replies to it
    uint64_t data_placed            # bytes of WRITEs that the kernel put into the channel
    uint64_t data_piped             # bytes of replies to READ that went from a socket to the kernel by reference
    # spinning
    spinner spinner
    int spin_credit
    uint32_t spin_count
    spinner looker                  # of looking for requests; spinner is of looking for replies
    int look_credit
    uint32_t look_count

cdef struct pending_request:        # read while all workers were busy, or put off (delayed.pyx); the bytes follow
    pending_request *next
    size_t size
    int device                      # the descriptor it was read from, which takes the reply
    int64_t delay_us                # how long it was put off last; 0: never
    int64_t due_us                  # when it is to be tried again
    int64_t since_us
    int64_t interrupted_us          # 0: not
    bint answered                   # the kernel has its answer, but the server has still to be told

cdef struct waiting:                # a request that the server answers on the event channel (waits.pyx)
    waiting *next
    fuse_in_header request
    int device
    uint16_t op                     # OP_SETLKW, OP_OPEN, OP_READ, OP_WRITE; OP_RELEASE to undo an OP_OPEN
    uint32_t limit                  # READ: bytes that the kernel takes
    uint64_t done                   # WRITE: bytes that are written already
    uint8_t *message                # as it is sent; its tag is the request's unique
    size_t message_bytes
    bint sent
    bint interrupted
    bint wants_out                  # the server is to be told: CANCEL
    bint cancelled                  # it was
    bint orphan                     # the kernel has its answer; the server may still think that somebody waits
    bint dying                      # so does its owner: whatever was granted meanwhile is to be given back
    bint undoing                    # the message does that; its reply ends the matter
    int64_t since_us

cdef struct mount_change:           # a MOUNTS_CHANGED; its body follows
    mount_change *next
    size_t size

cdef struct mount_state:
    # fixed once the mount serves
    int device                      # /dev/fuse
    int triage_device               # a non-blocking clone of it; -1: none
    cache_mode cache
    uint64_t name_valid_s           # how long the kernel trusts a name and its attributes
    uint64_t absent_valid_s         # the same for a name that is not there
    bint direct_mmap                # the kernel can mmap what is open with FOPEN_DIRECT_IO
    bint setxattr_ext
    bint deny_others                # allow_root: only `owner` and root
    uint32_t owner
    bint special_remote             # opening a FIFO or device of the server opens it there
    bint polls                      # the kernel may ask what is ready
    int64_t timeout_us              # 0: wait for ever
    int64_t spin_us
    uint32_t max_payload            # of READ and WRITE, bytes
    uint32_t crew                   # workers that the processors have room for, each with its engine's
    void *rules                     # special_state of special.pxd; NULL: no rule is about anything below the source
    int event_fd                    # wakes the event thread
    int manager_fd                  # wakes the manager
    int changes_fd                  # wakes whoever follows the server's mounts
    # atomic
    int32_t stopping
    int32_t down                    # the server could not be reached for timeout_us: fail at once
    int32_t posix_locks             # a POSIX lock was asked for, ever
    int32_t releases                # RELEASEs under way
    int32_t breaks                  # how often the event channel broke
    int32_t renewals                # how often it was replaced because nothing came over it
    int32_t overdue                 # a process that ends did not wait for its close(2), and no reply has come since
    int32_t overdue_pid             # which it was last: it does not wait for its other files either
    int64_t silent_us               # how long the event channel has brought nothing, as far as we were running ourselves
    uint64_t invalidations          # notifications that make the kernel ask again
    uint64_t last_polled            # the highest fuse_poll_in.kh that asked for a notification
    # under guard
    pthread_mutex_t guard
    worker *workers[MAX_SLOTS]
    uint32_t worker_count           # running or being started
    uint32_t worker_limit
    uint32_t most_workers           # if the others hang
    uint32_t idle                   # waiting for the kernel's next request, or about to
    worker *reader                  # who does; NULL: nobody
    uint32_t serving                # with a request in hand
    uint32_t coming                 # woken: they will be idle soon
    bint starting                   # the manager is asked for one more
    worker *parked
    bint saturated                  # the event thread was told that nobody is idle
    pending_request *pending
    pending_request **pending_end
    pending_request *delayed        # put off; counted with the others
    size_t pending_count
    size_t pending_bytes
    forget_item *forgets
    size_t forget_count             # atomic too, as a hint
    size_t forget_room
    uint64_t closed[MAX_RELEASES]   # handles that are to be ended soon
    size_t closed_count             # atomic too, as a hint
    bint ending                     # a worker has handles that it tells the server to end; likewise
    uint64_t forgotten              # lookups that were queued to be given back to the server, ever
    waiting *waits
    bint has_statfs                 # what the server last said of the root
    bint has_attributes
    statfs_reply statfs
    attributes_reply attributes
    mount_change *changes           # not looked at yet, the oldest first
    mount_change **changes_end
    size_t change_count
    # the event thread's own
    line event
    uint64_t event_seen             # number of the last message of the session that was taken from the event channel
    uint32_t event_unconfirmed      # messages since we last told the server how far we are
    bint event_flushing
    int64_t pinged_us
    uint64_t waited_for             # a mark of what all workers wait for; 0: not all do
    int64_t waiting_since_us
    int64_t unanswered_us           # the first PING since the server was last heard; 0: none
    int bell                        # an epoll descriptor: event_fd, and the device while it triages
    uint8_t *triage_buffer          # BUFFER_BYTES
    uint64_t next_told              # fuse_poll_in.kh that is to be told next to ask again; 0: none
    bint dead                       # the event channel was given up because nothing came
