/* Order of accesses to memory that another processor, or a device behind a PCIe bridge, sees too.
 *
 * Sources: GCC manual, "Built-in Functions for Memory Model Aware Atomic Operations"; Intel SDM vol. 3, 9.2.2 and 12.3.1
 * (write-combining memory is weakly ordered: stores until SFENCE, loads until LFENCE); Arm ARM, B2.7.3 (DMB OSH reaches outer-shareable observers).
 */
#ifndef QTFS_BARRIERS_H
#define QTFS_BARRIERS_H

#include <stdint.h>

#if defined(__x86_64__)
static inline void ring_write_barrier(void) { __builtin_ia32_sfence(); }
static inline void ring_read_barrier(void) { __builtin_ia32_lfence(); }
static inline void ring_full_barrier(void) { __builtin_ia32_mfence(); }
static inline void ring_pause(void) { __builtin_ia32_pause(); }
#elif defined(__aarch64__)
static inline void ring_write_barrier(void) { __asm__ __volatile__("dmb oshst" ::: "memory"); }
static inline void ring_read_barrier(void) { __asm__ __volatile__("dmb oshld" ::: "memory"); }
static inline void ring_full_barrier(void) { __asm__ __volatile__("dmb osh" ::: "memory"); }
static inline void ring_pause(void) { __asm__ __volatile__("yield" ::: "memory"); }
#else
static inline void ring_write_barrier(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void ring_read_barrier(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void ring_full_barrier(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void ring_pause(void) {}
#endif

static inline uint64_t ring_load(const uint64_t *at)
{
    uint64_t value = __atomic_load_n(at, __ATOMIC_ACQUIRE);
    ring_read_barrier();
    return value;
}

/* Everything written before is seen by whoever sees this. */
static inline void ring_publish(uint64_t *at, uint64_t value)
{
    ring_write_barrier();
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
}

static inline uint32_t ring_load_32(const uint32_t *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
static inline void ring_store_32(uint32_t *at, uint32_t value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }

#endif
