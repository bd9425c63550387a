/* The memory of weak.h, and main(): every execution that C11 allows a few calls of the core, one after the other.
 *
 * usage: weak [SCENARIO ...]; exit status 1 where an execution does what must not be, with its accesses.
 *
 * The machine is the view machine of RC11 (release/acquire and relaxed accesses, fences): a location keeps all stores
 * made to it, in their order; a thread's view says which of them it may no longer miss; a load takes any store that
 * is not older. A release store, or a relaxed one behind a release fence, carries a view that an acquire load, or an
 * acquire fence behind a relaxed one, joins to the reader's. Full fences exchange views through one that is global.
 * So loads happen early and stores become visible late, in any order that the program does not forbid. What it does
 * not show: a store that overtakes an older load (nothing here rests on that), and a store that comes to stand in the
 * order of its location before one executed earlier. Plain copies are relaxed accesses, 8 bytes each; of a long copy
 * only the first MOST_WORDS words are the machine's.
 *
 * Plain accesses are watched where the compiler tells of them (-fsanitize=thread, without its library: the calls end
 * here): one that another thread's store or, if it is a store, read is not ordered before is a data race.
 */
#define WEAK_MACHINE
#include "weak.h"

#include <setjmp.h>
#include <ucontext.h>

enum { LOCATIONS = 96, STORES = 24, RANGES = 8, THREADS = 3, DEPTH = 4096, MOST_WORDS = 5, FAIR = 2, LOG = 4096 };

typedef struct {
    uint8_t at[LOCATIONS];
} view;
typedef struct {
    uint64_t value;
    view view;
} message;
static const message nothing;
typedef struct {
    view now, acquired, released;
    uint32_t *futex; /* sleeps on it */
    int over, waits;
} thread;

static struct {
    int count[LOCATIONS];
    message stores[LOCATIONS][STORES];
    thread threads[THREADS];
    view full, lock; /* lock: what the last one to hold it knew */
    int locked;      /* thread + 1 */
    uint8_t read[LOCATIONS][THREADS]; /* plainly: the thread's clock then, which is the last places of its view */
    uint64_t clock;
} m, scene; /* scene: m when weak_explore was called */

static struct {
    uintptr_t start;
    size_t n;
    int plain;
} ranges[RANGES];
static int nranges;
/* Of a location in all executions of a scenario; in each of them it begins with its first access (count 0 until then). */
static int numbered;
static uintptr_t addresses[LOCATIONS];
static size_t sizes[LOCATIONS];

static int me, exploring, switching;
/* A thread's first turn ever is a context of its own; further ones are jumps, which make no system call: to where it
 * paused, or, in another execution, to where its stack begins. */
static ucontext_t contexts[THREADS];
static jmp_buf places[THREADS], starts[THREADS], scheduler;
static int begun[THREADS], made[THREADS];
static char stacks[THREADS][1 << 16];
static void (*bodies[THREADS])(void);
static int number_of_bodies;

/* The choices of this execution: those that are repeated from the last one, and then the first of each. */
static struct {
    int taken, of;
} choices[DEPTH];
static int depth, known;
static uint64_t executions;

static struct {
    const char *what;
    uint64_t times;
} counts[16];
typedef struct {
    const char *what;
    uint64_t value;
    int at, thread, old; /* thread: -1 before the exploration */
} entry;
static entry logged[LOG];
static int nlogged;
static const char *name;

void *(*weak_on_mmap)(void *, size_t);
ssize_t (*weak_on_write)(const void *, size_t, off_t);

static void say(const char *what, int at, uint64_t value, int old) {
    if (nlogged < LOG) /* formatted where it is wanted only: this is called for each access of each execution */
        logged[nlogged++] = (entry){what, value, at, exploring ? me : -1, old};
}

_Noreturn void weak_fail(const char *what, uint64_t a, uint64_t b) {
    for (int i = 0; i < nlogged; i++) {
        const entry *e = &logged[i];
        printf("%c%c %-8s location %2d (+%td)  %llu%s\n", e->thread < 0 ? '(' : ' ', e->thread < 0 ? '1' : '0' + e->thread,
               e->what, e->at, e->at < 0 ? 0 : (ptrdiff_t)(addresses[e->at] - ranges[0].start),
               (unsigned long long)e->value, e->old ? "  (an old value)" : "");
    }
    printf("%s: execution %llu: %s: %llu, %llu\n", name, (unsigned long long)executions, what, (unsigned long long)a,
           (unsigned long long)b);
    fflush(stdout);
    _exit(1);
}

void weak_count(const char *what) {
    for (int i = 0; i < 16; i++) {
        if (counts[i].what == NULL)
            counts[i].what = what;
        if (strcmp(counts[i].what, what) == 0) {
            counts[i].times++;
            return;
        }
    }
    weak_fail("too many counts", 0, 0);
}

int weak_choose(int n) {
    if (n <= 1 || !exploring)
        return 0;
    if (depth == DEPTH)
        weak_fail("an execution without end", 0, 0);
    if (depth == known) {
        choices[known].taken = 0;
        choices[known++].of = n;
    }
    if (choices[depth].of != n)
        weak_fail("not the same execution again", choices[depth].of, n);
    return choices[depth++].taken;
}

static int next_execution(void) {
    while (known > 0 && choices[known - 1].taken + 1 == choices[known - 1].of)
        known--;
    if (known == 0)
        return 0;
    choices[known - 1].taken++;
    return 1;
}

/* ------------------------------------------------------------------ memory */

static void join(view *to, const view *from) {
    for (int i = 0; i < LOCATIONS; i++)
        to->at[i] = to->at[i] > from->at[i] ? to->at[i] : from->at[i];
}

/* 2: also without atomics. */
static int shared(const volatile void *p) {
    for (int i = 0; i < nranges; i++)
        if ((uintptr_t)p - ranges[i].start < ranges[i].n)
            return 1 + ranges[i].plain;
    return 0;
}

/* The location that was stored to plainly last: its value is seen after the store. */
static int unseen = -1;
static void see(void) {
    if (unseen >= 0)
        memcpy(&m.stores[unseen][m.count[unseen] - 1].value, (const void *)addresses[unseen], sizes[unseen]);
    unseen = -1;
}

static int location(const volatile void *p, size_t size) {
    static uint8_t places[1024]; /* of addresses: location + 1, or 0; a place that is taken is followed by the next */
    unsigned place = (unsigned)((uintptr_t)p / 4 % 1024);
    int i;
    see();
    if (numbered == 0)
        memset(places, 0, sizeof places);
    while (places[place] != 0 && addresses[places[place] - 1] != (uintptr_t)p)
        place = (place + 1) % 1024;
    if (places[place] == 0) {
        if (numbered == LOCATIONS - THREADS)
            weak_fail("too many locations", (uint64_t)numbered, 0);
        places[place] = (uint8_t)++numbered;
        addresses[numbered - 1] = (uintptr_t)p;
        sizes[numbered - 1] = size;
    }
    i = places[place] - 1;
    if (sizes[i] != size)
        weak_fail("accesses of different widths", (uintptr_t)p - ranges[0].start, size);
    if (m.count[i] == 0) {
        m.count[i] = 1;
        m.stores[i][0] = nothing;
        memcpy(&m.stores[i][0].value, (const void *)p, size);
    }
    return i;
}

static int can_run(int i) { return i < number_of_bodies && !m.threads[i].over && m.threads[i].futex == NULL; }

static void run_body(void);
_Noreturn static void go_on(void) {
    if (begun[me])
        _longjmp(places[me], 1);
    begun[me] = 1;
    if (made[me])
        _longjmp(starts[me], 1);
    made[me] = 1;
    getcontext(&contexts[me]);
    contexts[me].uc_stack.ss_sp = stacks[me];
    contexts[me].uc_stack.ss_size = sizeof stacks[me];
    contexts[me].uc_link = NULL;
    makecontext(&contexts[me], run_body, 0);
    setcontext(&contexts[me]);
    weak_fail("setcontext", 0, 0);
}

/* Another thread may come first, and must where this one sleeps; back when it is this one's turn. */
static void pause_here(void) {
    int ready[THREADS], count = 0, self = me;
    see();
    if (!exploring || !switching)
        return;
    if (can_run(self))
        ready[count++] = self;
    for (int i = 0; i < THREADS; i++)
        if (i != self && can_run(i))
            ready[count++] = i;
    if (count == 0)
        _longjmp(scheduler, 1); /* for good */
    me = ready[weak_choose(count)];
    if (me != self)
        if (_setjmp(places[self]) == 0)
            go_on();
}

uint64_t weak_load(const volatile void *p, size_t size, memory_order order) {
    thread *t = &m.threads[me];
    int at, last, taken;
    if (!shared(p)) {
        uint64_t value = 0;
        memcpy(&value, (const void *)p, size);
        return value;
    }
    pause_here();
    at = location(p, size);
    last = m.count[at] - 1;
    /* The newest first. Who waits again and again sees in the end what there is. */
    taken = last - (t->waits >= FAIR ? 0 : weak_choose(last - t->now.at[at] + 1));
    t->now.at[at] = (uint8_t)taken;
    join(&t->acquired, &m.stores[at][taken].view);
    join(&t->acquired, &t->now);
    if (order != memory_order_relaxed)
        join(&t->now, &m.stores[at][taken].view);
    say(order == memory_order_relaxed ? "load" : "acquire", at, m.stores[at][taken].value, taken < last);
    return m.stores[at][taken].value;
}

static void append(int at, uint64_t value, int release, const view *also) {
    thread *t = &m.threads[me];
    message *new;
    int n = m.count[at]++;
    if (n == STORES)
        weak_fail("too many stores", at, n);
    t->now.at[at] = t->acquired.at[at] = (uint8_t)n;
    new = &m.stores[at][n];
    new->value = value;
    new->view = release ? t->now : t->released;
    new->view.at[at] = (uint8_t)n;
    if (also != NULL)
        join(&new->view, also);
    if (shared((void *)addresses[at]) == 2)
        memcpy((void *)addresses[at], &value, sizes[at]);
}

void weak_store(volatile void *p, size_t size, uint64_t value, memory_order order) {
    int at;
    if (!shared(p)) {
        memcpy((void *)p, &value, size);
        return;
    }
    /* A word of 8 bytes has one writer: stored early, it can still be missed by everybody. */
    if (size != 8)
        pause_here();
    at = location(p, size);
    append(at, value, order != memory_order_relaxed, NULL);
    say(order == memory_order_relaxed ? "store" : "release", at, value, 0);
}

static uint64_t update(volatile void *p, size_t size, uint64_t value, int add) {
    uint64_t before = 0;
    thread *t = &m.threads[me];
    message *last;
    int at;
    if (!shared(p)) {
        memcpy(&before, (void *)p, size);
        value += add ? before : 0;
        memcpy((void *)p, &value, size);
        return before;
    }
    pause_here();
    at = location(p, size);
    last = &m.stores[at][m.count[at] - 1];
    before = last->value;
    join(&t->now, &last->view);
    join(&t->acquired, &t->now);
    value += add ? before : 0;
    append(at, size == 4 ? (uint32_t)value : value, 1, &last->view);
    say("update", at, value, 0);
    return before;
}
uint64_t weak_exchange(volatile void *p, size_t size, uint64_t value) { return update(p, size, value, 0); }
uint64_t weak_add(volatile void *p, size_t size, uint64_t value) { return update(p, size, value, 1); }

void weak_fence(memory_order order) {
    thread *t = &m.threads[me];
    if (order == memory_order_seq_cst)
        pause_here();
    if (order != memory_order_release)
        t->now = t->acquired;
    if (order == memory_order_seq_cst) {
        join(&m.full, &t->now);
        t->now = m.full;
        join(&t->acquired, &t->now);
    }
    if (order != memory_order_acquire)
        t->released = t->now;
    say(order == memory_order_seq_cst ? "full" : order == memory_order_acquire ? "acquire" : "release", -1, 0, 0);
}

void *weak_copy(void *dst, const void *src, size_t n) {
    int from = shared(src), to = shared(dst);
    uint64_t word;
    if (!from && !to)
        return memcpy(dst, src, n);
    for (size_t i = 0; i < n; i += 8) {
        size_t size = n - i < 8 ? n - i : 8;
        word = 0;
        if (i >= MOST_WORDS * 8) {
            if (!to && !from)
                memcpy((char *)dst + i, (const char *)src + i, size);
            continue;
        }
        if (from)
            word = weak_load((const char *)src + i, size, memory_order_relaxed);
        else
            memcpy(&word, (const char *)src + i, size);
        if (to)
            weak_store((char *)dst + i, size, word, memory_order_relaxed);
        else
            memcpy((char *)dst + i, &word, size);
    }
    return dst;
}

void *weak_set(void *dst, int value, size_t n) {
    uint64_t word;
    if (!shared(dst))
        return memset(dst, value, n);
    memset(&word, value, 8);
    for (size_t i = 0; i < n; i += 8) { /* of long elements what was touched before, each word by itself */
        if (i >= MOST_WORDS * 8) {
            int found = 0;
            for (int k = 0; k < numbered; k++)
                found |= m.count[k] != 0 && addresses[k] == (uintptr_t)dst + i;
            if (!found)
                continue;
        }
        weak_store((char *)dst + i, 8, word, memory_order_relaxed);
    }
    return dst;
}

/* ------------------------------------------------------------------ plain accesses */

static void plain(void *p, size_t size, int store) {
    thread *t = &m.threads[me];
    int at, n;
    if (!exploring || shared(p) != 2)
        return;
    at = location(p, size);
    if (t->now.at[at] != m.count[at] - 1)
        weak_fail(store ? "a plain store, and another's that is not ordered before it: offset, last value"
                        : "a plain read, and a store that is not ordered before it: offset, last value",
                  (uintptr_t)p - ranges[0].start, m.stores[at][m.count[at] - 1].value);
    if (!store) {
        if (++t->now.at[LOCATIONS - 1 - me] == 0)
            weak_fail("too many plain reads", 0, 0);
        t->acquired.at[LOCATIONS - 1 - me] = m.read[at][me] = t->now.at[LOCATIONS - 1 - me];
        return;
    }
    for (int i = 0; i < THREADS; i++)
        if (i != me && m.read[at][i] > t->now.at[LOCATIONS - 1 - i])
            weak_fail("a plain store, and a read that is not ordered before it: offset", (uintptr_t)p - ranges[0].start, 0);
    n = m.count[at]++;
    if (n == STORES)
        weak_fail("too many stores", (uint64_t)at, (uint64_t)n);
    m.stores[at][n] = nothing;
    m.stores[at][n].view.at[at] = t->now.at[at] = t->acquired.at[at] = (uint8_t)n;
    unseen = at;
    say("plain", at, 0, 0);
}
#define WATCH(size) \
    void __tsan_read##size(void *p) { plain(p, size, 0); } \
    void __tsan_write##size(void *p) { plain(p, size, 1); } \
    void __tsan_unaligned_read##size(void *p) { plain(p, size, 0); } \
    void __tsan_unaligned_write##size(void *p) { plain(p, size, 1); }
WATCH(1)
WATCH(2)
WATCH(4)
WATCH(8)
WATCH(16)
void __tsan_read_range(void *p, size_t n) { plain(p, n, 0); }
void __tsan_write_range(void *p, size_t n) { plain(p, n, 1); }
void __tsan_func_entry(void *p) { (void)p; }
void __tsan_func_exit(void) {}
void __tsan_init(void) {}

int weak_lock(pthread_mutex_t *lock) {
    if (!exploring || !switching)
        return 0;
    pause_here();
    while (m.locked) {
        m.threads[me].futex = (uint32_t *)lock;
        pause_here();
    }
    m.locked = me + 1;
    join(&m.threads[me].now, &m.lock);
    join(&m.threads[me].acquired, &m.lock);
    return 0;
}
int weak_unlock(pthread_mutex_t *lock) {
    if (!exploring || !switching)
        return 0;
    see();
    m.locked = 0;
    join(&m.lock, &m.threads[me].now);
    for (int i = 0; i < THREADS; i++)
        if (m.threads[i].futex == (uint32_t *)lock)
            m.threads[i].futex = NULL;
    return 0;
}

/* ------------------------------------------------------------------ the system */

long weak_syscall(long number, ...) {
    va_list list;
    long a, b, c;
    uint32_t *word;
    int at;
    va_start(list, number);
    if (number == 449) { /* futex_waitv; the scenarios' lists have one entry */
        const uint64_t *entry = va_arg(list, const uint64_t *); /* struct futex_waitv: val, uaddr, flags */
        va_end(list);
        return weak_syscall(SYS_futex, (uint32_t *)(uintptr_t)entry[1], FUTEX_WAIT, (uint32_t)entry[0]);
    }
    if (number != SYS_futex) {
        a = va_arg(list, long);
        b = va_arg(list, long);
        c = va_arg(list, long);
        va_end(list);
        return syscall(number, a, b, c);
    }
    word = va_arg(list, uint32_t *);
    a = va_arg(list, int);
    b = va_arg(list, uint32_t);
    va_end(list);
    if (!shared(word))
        return 0;
    pause_here();
    if (a == FUTEX_WAKE) { /* the kernel's lock orders this and the look of one that goes to sleep */
        for (int i = 0; i < THREADS; i++)
            if (m.threads[i].futex == word)
                m.threads[i].futex = NULL;
        say("wake", -1, 0, 0);
        return 0;
    }
    at = location(word, 4);
    m.threads[me].waits++;
    if (m.stores[at][m.count[at] - 1].value != (uint32_t)b) {
        say("changed", at, (uint32_t)b, 0);
        errno = EAGAIN;
        return -1;
    }
    m.threads[me].futex = word;
    say("sleep", at, (uint32_t)b, 0);
    while (m.threads[me].futex != NULL) {
        if (!switching)
            weak_fail("a sleep with nobody to end it", 0, 0);
        pause_here();
    }
    return 0;
}

int weak_clock(clockid_t clock, struct timespec *t) {
    (void)clock;
    m.clock += 3500000; /* SETTLE_NS passes in a few looks */
    t->tv_sec = (time_t)(m.clock / 1000000000u);
    t->tv_nsec = (long)(m.clock % 1000000000u);
    return 0;
}
int weak_nanosleep(const struct timespec *t, struct timespec *left) {
    (void)left;
    m.clock += (uint64_t)t->tv_nsec;
    return 0;
}
void *weak_mmap(void *start, size_t length, int protection, int flags, int fd, off_t offset) {
    return weak_on_mmap ? weak_on_mmap(start, length) : mmap(start, length, protection, flags, fd, offset);
}
ssize_t weak_pwrite(int fd, const void *data, size_t n, off_t offset) {
    return weak_on_write ? weak_on_write(data, n, offset) : pwrite(fd, data, n, offset);
}

/* ------------------------------------------------------------------ scenarios */

void weak_share(const volatile void *start, size_t n) {
    ranges[nranges].start = (uintptr_t)start;
    ranges[nranges].n = n;
    ranges[nranges++].plain = 0;
}
void weak_shared_memory(void *start, size_t n) {
    memset(start, 0, n);
    weak_share(start, n);
}
void weak_share_plainly(void *start, size_t n) {
    weak_share(start, n);
    ranges[nranges - 1].plain = 1;
}
static void (*each)(void);
void weak_each(void (*reset)(void)) { each = reset; }
void weak_thread(int number) { me = number; }
int weak_asleep(int number) { return m.threads[number].futex != NULL; }

static void run_body(void) {
    _setjmp(starts[me]);
    bodies[me]();
    m.threads[me].over = 1;
    pause_here();
}

static void execute(int n) {
    for (int i = 0; i < numbered; i++) {
        m.count[i] = scene.count[i];
        memcpy(m.stores[i], scene.stores[i], (size_t)scene.count[i] * sizeof(message));
    }
    memcpy(m.threads, scene.threads, sizeof m.threads);
    memcpy(m.read, scene.read, sizeof m.read);
    m.full = scene.full;
    m.lock = scene.lock;
    m.locked = scene.locked;
    m.clock = scene.clock;
    depth = 0;
    executions++;
    unseen = -1;
    if (each != NULL) {
        int kept = nranges;
        nranges = 0;
        each();
        nranges = kept;
    }
    exploring = 1;
    switching = n > 1;
    if (!switching) {
        me = THREADS - 1;
        bodies[0]();
        return;
    }
    memset(begun, 0, sizeof begun);
    me = weak_choose(n);
    if (_setjmp(scheduler) == 0)
        go_on();
}

static void (*at_end)(void);

/* With one body, the scene's own threads have done everything that they will do; the body is a further thread. With
 * several, they take turns. The last of `list` behind the n bodies, if not NULL, looks at how it ended. */
void weak_explore(void (*const list[])(void), int n) {
    for (int i = 0; i < n; i++)
        bodies[i] = list[i];
    at_end = list[n];
    number_of_bodies = n;
}

static int run(const scenario *s) {
    int kept;
    name = s->name;
    memset(&m, 0, sizeof m);
    memset(counts, 0, sizeof counts);
    nranges = me = exploring = known = nlogged = numbered = 0;
    executions = 0;
    each = NULL;
    s->begin();
    scene = m;
    kept = nlogged;
    do {
        nlogged = kept;
        execute(number_of_bodies);
        see();
        exploring = 0;
        if (at_end != NULL)
            at_end();
    } while (next_execution());
    printf("%-10s %9llu executions", name, (unsigned long long)executions);
    for (int i = 0; i < 16 && counts[i].what; i++)
        printf(", %s %llu", counts[i].what, (unsigned long long)counts[i].times);
    printf("\n");
    fflush(stdout);
    for (int i = 0; i < 6 && s->shows[i]; i++) {
        int found = 0;
        for (int k = 0; k < 16 && counts[k].what; k++)
            found |= strcmp(counts[k].what, s->shows[i]) == 0;
        if (!found) {
            printf("%s: no execution showed: %s\n", name, s->shows[i]);
            return 1;
        }
    }
    return 0;
}

/* reader_init asks for the CPUs, in each execution; libc would open a file for that. */
long sysconf(int what) { return what == _SC_NPROCESSORS_ONLN ? 2 : what == _SC_PAGESIZE ? getpagesize() : -1; }

int main(int argc, char **argv) {
    const scenario *lists[] = {ring_scenarios, server_scenarios, client_scenarios, marks_scenarios};
    int bad = 0, ran = 0;
    ring_ready();
    for (int l = 0; l < 4; l++)
        for (const scenario *s = lists[l]; s && s->name; s++) {
            int wanted = argc == 1;
            for (int i = 1; i < argc; i++)
                wanted |= strcmp(argv[i], s->name) == 0;
            if (wanted) {
                ran++;
                bad |= run(s);
            }
        }
    return bad || ran == 0 || (argc > 1 && ran != argc - 1);
}
