/* Typed C11 atomics over plain memory, the fences, and the futex; no Python.h.
 *
 * Shared memory is declared as plain integers (its layout is a wire format); every access to a word that the
 * other side may change goes through these functions, so that it is one load or one store of full width and the
 * compiler neither repeats nor splits it. docs/memory-model.md names each fence and its partner.
 */
#ifndef MUENFAST_ATOMICS_H
#define MUENFAST_ATOMICS_H

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "64-bit atomics must be lock-free: shared memory has no lock table");
_Static_assert(sizeof(_Atomic uint64_t) == sizeof(uint64_t), "atomic u64 must have the plain layout");
_Static_assert(sizeof(_Atomic uint32_t) == sizeof(uint32_t), "atomic u32 must have the plain layout");

#define MF_ATOMIC(type, p) ((_Atomic type *)(uintptr_t)(p))

static inline uint64_t load_relaxed64(const uint64_t *p) {
    return atomic_load_explicit(MF_ATOMIC(uint64_t, p), memory_order_relaxed);
}
static inline uint64_t load_acquire64(const uint64_t *p) {
    return atomic_load_explicit(MF_ATOMIC(uint64_t, p), memory_order_acquire);
}
static inline void store_relaxed64(uint64_t *p, uint64_t v) {
    atomic_store_explicit(MF_ATOMIC(uint64_t, p), v, memory_order_relaxed);
}
static inline void store_release64(uint64_t *p, uint64_t v) {
    atomic_store_explicit(MF_ATOMIC(uint64_t, p), v, memory_order_release);
}
static inline uint32_t load_relaxed32(const uint32_t *p) {
    return atomic_load_explicit(MF_ATOMIC(uint32_t, p), memory_order_relaxed);
}
static inline uint32_t load_acquire32(const uint32_t *p) {
    return atomic_load_explicit(MF_ATOMIC(uint32_t, p), memory_order_acquire);
}
static inline void store_relaxed32(uint32_t *p, uint32_t v) {
    atomic_store_explicit(MF_ATOMIC(uint32_t, p), v, memory_order_relaxed);
}
static inline void store_release32(uint32_t *p, uint32_t v) {
    atomic_store_explicit(MF_ATOMIC(uint32_t, p), v, memory_order_release);
}
/* Puts v where `seen` stands; whether it did. */
static inline int compare_exchange_acqrel32(uint32_t *p, uint32_t seen, uint32_t v) {
    return atomic_compare_exchange_strong_explicit(MF_ATOMIC(uint32_t, p), &seen, v, memory_order_acq_rel,
                                                   memory_order_relaxed);
}
static inline uint32_t exchange_acqrel32(uint32_t *p, uint32_t v) {
    return atomic_exchange_explicit(MF_ATOMIC(uint32_t, p), v, memory_order_acq_rel);
}
static inline uint32_t fetch_add_acqrel32(uint32_t *p, uint32_t v) {
    return atomic_fetch_add_explicit(MF_ATOMIC(uint32_t, p), v, memory_order_acq_rel);
}
static inline uint64_t fetch_add_relaxed64(uint64_t *p, uint64_t v) {
    return atomic_fetch_add_explicit(MF_ATOMIC(uint64_t, p), v, memory_order_relaxed);
}
/* A counter with one writing thread: readers of statistics see whole values. */
static inline void count64(uint64_t *p, uint64_t n) { store_relaxed64(p, load_relaxed64(p) + n); }

static inline void fence_acquire(void) { atomic_thread_fence(memory_order_acquire); }
static inline void fence_release(void) { atomic_thread_fence(memory_order_release); }
static inline void fence_seq_cst(void) { atomic_thread_fence(memory_order_seq_cst); }

static inline void cpu_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}
/* One turn of a wait that began `passed` nanoseconds ago: SPIN_PAUSES pauses at first, for a peer that runs answers within
 * SPIN_ALONE_NS or so. After that, whoever else wants this CPU gets it: perhaps what is waited for needs him. */
#define SPIN_PAUSES 8
#define SPIN_ALONE_NS UINT64_C(2000)
static inline void spin_once(uint64_t passed) {
    int n;
    if (passed >= SPIN_ALONE_NS)
        sched_yield();
    else
        for (n = 0; n < SPIN_PAUSES; n++)
            cpu_pause();
}
/* Whether a wait spins before it sleeps: only while that paid lately or, to see whether it would, once in SPIN_PROBE waits,
 * and less often, down to once in SPIN_PROBE_LEAST, as it goes on not to. Of one thread; begins as zeros. */
enum { SPIN_SCORE = 16, SPIN_PROBE = 16, SPIN_PROBE_LEAST = 512 };
typedef struct {
    uint32_t score; /* > 0: recent spins ended with what was waited for */
    uint32_t waits; /* since the last spin */
    uint32_t every; /* so many of them between two probes; 0 is SPIN_PROBE */
} spin_habit;
static inline int spin_pays(spin_habit *h) {
    if (h->score == 0 && ++h->waits < (h->every == 0 ? SPIN_PROBE : h->every))
        return 0;
    h->waits = 0;
    return 1;
}
static inline void spin_paid(spin_habit *h) {
    h->score = SPIN_SCORE;
    h->every = SPIN_PROBE;
}
static inline void spin_in_vain(spin_habit *h) {
    if (h->score != 0)
        h->score -= 4;
    else if (h->every < SPIN_PROBE_LEAST)
        h->every = h->every == 0 ? SPIN_PROBE : h->every * 2;
}

/* Asks for a line that will be written. The builtin asks x86 for a shared copy only, unless the compiler may assume
 * prefetchw; processors without that take it for a no-op. */
static inline void prefetch_write(const void *p) {
#if defined(__x86_64__)
    __asm__ volatile("prefetchw %0" : : "m"(*(const char *)p));
#else
    __builtin_prefetch(p, 1, 3);
#endif
}

/* CLOCK_MONOTONIC in nanoseconds. */
static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
static inline void sleep_ns(uint64_t ns) {
    struct timespec t = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
    nanosleep(&t, NULL);
}
/* Shared futexes (no PRIVATE flag): the word may lie in memory of several processes. 0, or a negative errno. */
static inline int futex_wait_ns(uint32_t *word, uint32_t seen, uint64_t ns) {
    struct timespec t = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
    return syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, NULL, 0) < 0 ? -errno : 0;
}
static inline int futex_wake_all(uint32_t *word) {
    return syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0) < 0 ? -errno : 0;
}
/* futex_waitv(2), Linux 5.16; older headers lack it. */
#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif
enum { FUTEX_LIST_MOST = 128, FUTEX_WORD_32 = 2 }; /* FUTEX_WAITV_MAX, FUTEX_32 (FUTEX2_SIZE_U32) */
typedef struct {
    uint64_t seen, word;
    uint32_t flags, reserved;
} futex_entry; /* struct futex_waitv */
static inline futex_entry futex_entry_of(uint32_t *word, uint32_t seen) {
    return (futex_entry){seen, (uint64_t)(uintptr_t)word, FUTEX_WORD_32, 0};
}
/* Sleeps while all words hold what was seen. Which one changed or was woken, or a negative errno. */
static inline int futex_wait_any_ns(futex_entry *list, unsigned n, uint64_t ns) {
    uint64_t until = now_ns() + ns;
    struct timespec t = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
    long woken = syscall(SYS_futex_waitv, list, n, 0, &t, CLOCK_MONOTONIC);
    return woken < 0 ? -errno : (int)woken;
}
/* With one CPU online, spinning only keeps the peer from running. What this thread is pinned to tells nothing: the
 * peer may have the other CPU. Whether spinning pays is learnt from its success. */
static inline int online_cpus(void) { return (int)sysconf(_SC_NPROCESSORS_ONLN); }

/* Ownership flag of an object that one thread at a time may use. Under the GIL it changes only while the GIL is held;
 * free-threaded builds need the atomic. */
static inline int busy_enter(uint32_t *flag) {
#ifdef Py_GIL_DISABLED
    return exchange_acqrel32(flag, 1) == 0;
#else
    if (*flag)
        return 0;
    *flag = 1;
    return 1;
#endif
}
static inline void busy_leave(uint32_t *flag) { store_release32(flag, 0); }

#endif
