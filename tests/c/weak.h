/* A weak memory machine for the cores; included before the C that Cython made of one (tests/test_memory_model.py).
 *
 * The core's own C is compiled with these macros in place of atomics, fences, memcpy, memset, clock and futex: every
 * access to memory that was shared with weak_share() goes to the machine of weak.c, which may give a load any value
 * that C11 allows it. What is not shared is accessed as ever.
 */
#ifndef WEAK_H
#define WEAK_H

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* Called by the core. */
uint64_t weak_load(const volatile void *p, size_t size, memory_order order);
void weak_store(volatile void *p, size_t size, uint64_t value, memory_order order);
uint64_t weak_exchange(volatile void *p, size_t size, uint64_t value);
uint64_t weak_add(volatile void *p, size_t size, uint64_t value);
void weak_fence(memory_order order);
void *weak_copy(void *dst, const void *src, size_t n);
void *weak_set(void *dst, int value, size_t n);
long weak_syscall(long number, ...);
int weak_clock(clockid_t clock, struct timespec *t);
int weak_nanosleep(const struct timespec *t, struct timespec *left);
void *weak_mmap(void *start, size_t length, int protection, int flags, int fd, off_t offset);
ssize_t weak_pwrite(int fd, const void *data, size_t n, off_t offset);
int weak_lock(pthread_mutex_t *lock);
int weak_unlock(pthread_mutex_t *lock);

/* Called by the scenarios. */
void weak_share(const volatile void *start, size_t n);
void weak_shared_memory(void *start, size_t n); /* shared, and zero at the beginning of each execution */
void weak_share_plainly(void *start, size_t n); /* shared, and accessed without atomics, too, where it is watched */
void weak_each(void (*reset)(void));            /* called before each execution */
void weak_thread(int number);                   /* goes on as that thread, choosing the newest of everything */
void weak_explore(void (*const bodies[])(void), int n); /* runs them to their ends, with every choice there is */
int weak_asleep(int number);                    /* whether that thread's body sleeps on a futex, for ever */
_Noreturn void weak_fail(const char *what, uint64_t a, uint64_t b);
void weak_count(const char *what);              /* this execution showed it */
int weak_choose(int n);

extern void *(*weak_on_mmap)(void *start, size_t length);
extern ssize_t (*weak_on_write)(const void *data, size_t n, off_t offset);

typedef struct {
    const char *name;
    void (*begin)(void);  /* makes the scene and calls weak_explore */
    const char *shows[6]; /* what must have happened in some execution */
} scenario;
extern const scenario ring_scenarios[];
extern const scenario server_scenarios[] __attribute__((weak)), client_scenarios[] __attribute__((weak)),
    marks_scenarios[] __attribute__((weak));
void *ring_function(const char *name);
void ring_ready(void);

#undef atomic_load_explicit
#undef atomic_store_explicit
#undef atomic_exchange_explicit
#undef atomic_fetch_add_explicit
#undef atomic_thread_fence
#define atomic_load_explicit(p, order) ((__typeof__(*(p) + 0))weak_load((p), sizeof(*(p)), (order)))
#define atomic_store_explicit(p, v, order) weak_store((p), sizeof(*(p)), (uint64_t)(v), (order))
#define atomic_exchange_explicit(p, v, order) ((__typeof__(*(p) + 0))weak_exchange((p), sizeof(*(p)), (uint64_t)(v)))
#define atomic_fetch_add_explicit(p, v, order) ((__typeof__(*(p) + 0))weak_add((p), sizeof(*(p)), (uint64_t)(v)))
#define atomic_thread_fence(order) weak_fence(order)

#ifndef WEAK_MACHINE
#define COPY_VECTORS 0 /* _copy.h */
#undef memcpy
#undef memset
#define memcpy(d, s, n) weak_copy((d), (s), (n))
#define memset(d, v, n) weak_set((d), (v), (n))
#define syscall(...) weak_syscall(__VA_ARGS__)
#define clock_gettime(c, t) weak_clock((c), (t))
#define nanosleep(t, l) weak_nanosleep((t), (l))
#define mmap(a, n, p, f, d, o) weak_mmap((a), (n), (p), (f), (d), (o))
#define pthread_mutex_lock(l) weak_lock(l)
#define pthread_mutex_unlock(l) weak_unlock(l)
#define pwrite(f, d, n, o) weak_pwrite((f), (d), (n), (o))
#endif

#endif
