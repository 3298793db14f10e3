"""What special rules are kept in, with what has come of them: of one mount."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from qtfs_client.includes.linux cimport pthread_mutex_t
from qtfs_common.tries cimport trie

cdef enum:                          # special_rule.action
    DO_RELAY
    DO_LINK
    DO_HIDE
    DO_PROTECT
    DO_REPLACE

cdef struct special_rule:
    int action                      # DO_*
    bint named                      # {name} is asked for, or its process
    char *target                    # DO_LINK
    char *commands                  # each with its NUL, an empty one at the end; NULL: whatever the process is called

cdef struct special_vertex:         # of the trie
    uint32_t first_rule             # in special_state.order: the rules of its path, the last one of the file first
    uint32_t rule_count
    bint leads                      # rules are for what lies below

cdef struct known_node:             # a node whose children rules are for, or that is read-only
    known_node *next
    uint64_t id
    uint64_t lookups                # of those that the kernel holds
    uint32_t vertex
    bint read_only

cdef struct production:             # an OPEN that waits for its content
    production *next
    uint64_t unique
    int device
    uint32_t pid
    bint interrupted                # an INTERRUPT named it; the kernel sends no second one

cdef struct made_file:              # an open file whose content we have
    uint8_t *data                   # NULL: free
    size_t size

cdef struct special_state:
    void *owner                     # MadeNodes, which outlives the mount
    trie *paths                     # relative to the source
    special_vertex *vertices
    special_rule *rules
    uint32_t rules_count
    uint32_t *order
    bint read_only_root
    pthread_mutex_t guard           # of all below; taken alone
    known_node **buckets
    uint32_t bucket_mask
    uint32_t known_count
    production *productions
    made_file *files
    uint32_t file_room
