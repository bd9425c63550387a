/* The ring's core on the machine of weak.h: publishing, overrunning, restarting, sleeping, and the SIGBUS guard. */
#include "weak.h"

#include RING_SOURCE

#define CORE(name) __pyx_f_8muenfast_5_ring_##name
#define TYPE(name) struct __pyx_t_8muenfast_5_ring_##name
#define STATUS(name) __pyx_e_8muenfast_5_ring_##name

void *ring_function(const char *name) {
#define EXPORT(function) \
    if (strcmp(name, #function) == 0) \
        return (void *)CORE(function);
    RING_EXPORTS
    fprintf(stderr, "no function %s\n", name);
    exit(1);
}
void ring_ready(void) {
    core_constants();
    __pyx_v_8muenfast_5_ring_SETTLE_PAUSES = 0; /* pauses are nothing to this machine */
}

enum { SLOTS = 32, WRITER = 0, READING = 1, READER = 2 }; /* READER: the one body of weak_explore */
static uint64_t region[(64 + SLOTS) / 8], bell[16];
static TYPE(writer_t) w, w_kept;
static TYPE(reader_t) r, r_kept;

static int same;    /* epochs are started anew under their own number */
static int follows; /* nothing is overwritten in this scene, but by another life */

/* What the word i of element n of an epoch holds. */
static uint64_t word(uint64_t epoch, uint64_t n, uint64_t i) { return epoch * 1000 + n * 10 + i + 1; }

static void put(uint64_t count) {
    CORE(writer_reserve)(&w, count);
    for (uint64_t k = 0; k < count; k++) {
        uint64_t words[SLOTS / 8];
        for (uint64_t i = 0; i < w.size / 8; i++)
            words[i] = word(w.epoch, w.wc + k, i);
        memcpy(CORE(writer_slot)(&w, k), words, w.size);
    }
    CORE(writer_publish)(&w, count);
}
static void start(uint64_t size, uint64_t epoch) {
    CORE(writer_init)(&w, (uint8_t *)region, sizeof region, size, 7);
    w.bell = r.bell;
    CORE(writer_start)(&w, epoch);
}
/* One call of reader_copy, with everything that it says checked. */
static enum __pyx_t_8muenfast_5_ring_ring_status get(uint64_t most) {
    uint64_t got[SLOTS / 8], n, before = r.rc, epoch = r.epoch, size = r.size;
    enum __pyx_t_8muenfast_5_ring_ring_status status = CORE(reader_copy)(&r, (uint8_t *)got, most, &n);
    switch (status) {
    case STATUS(SUCCESS):
        weak_count("delivered");
        if (r.epoch != epoch || r.rc != before + n || n == 0)
            weak_fail("a position that does not follow", r.rc, before + n);
        for (uint64_t k = 0; k < n; k++)
            for (uint64_t i = 0; i < size / 8; i++)
                if (got[k * size / 8 + i] != word(epoch, before + k, i))
                    weak_fail("delivered what was not published: word, instead of", got[k * size / 8 + i],
                              word(epoch, before + k, i));
        break;
    case STATUS(OVERRUN_DETECTED):
        weak_count("overrun");
        if (follows)
            weak_fail("an overrun although no epoch has more than the ring holds", r.lost, r.epoch);
        if (before + r.lost != r.rc || r.lost == 0 || r.lost > 5)
            weak_fail("a loss that is not the distance", r.lost, r.rc - before);
        break;
    case STATUS(EPOCH_CHANGED):
        weak_count("synchronised");
        if (r.size != (r.epoch == 22 ? 8 : 16) || r.elements != SLOTS / r.size || r.rc != 0)
            weak_fail("the geometry of another epoch: epoch, size", r.epoch, r.size);
        break;
    case STATUS(INACTIVE):
        weak_count("inactive");
        break;
    case STATUS(NO_DATA):
        weak_count("no data");
        break;
    default:
        weak_fail("an incompatible channel: epoch", r.epoch, 0);
    }
    if (r.unsettled != 0 && !same)
        weak_fail("counters that went back without another epoch", r.unsettled, r.epoch);
    return status;
}

static void scene(void) {
    weak_shared_memory(region, sizeof region);
    memset(&r, 0, sizeof r);
    memset(&w, 0, sizeof w);
    follows = same = 0;
    CORE(reader_init)(&r, (const uint8_t *)region, sizeof region, 0, 7);
    r.may_spin = 0;
    weak_thread(WRITER);
}
static void scene_with_bell(void) {
    scene();
    weak_shared_memory(bell, sizeof bell);
    r.bell = (bell_page *)bell;
}
/* The reader synchronises, in the midst of the scene, and knows nothing of what comes. */
static void follow(void) {
    weak_thread(READER);
    if (get(1) != STATUS(EPOCH_CHANGED))
        weak_fail("not synchronised", r.epoch, 0);
    weak_thread(WRITER);
}
static void explore(void (*body)(void)) {
    void (*const bodies[])(void) = {body, NULL};
    r_kept = r;
    weak_explore(bodies, 1);
}

/* Elements become visible whole, also while their slots are written again: S1, F1, F2. */
static void read_four(void) {
    r = r_kept;
    for (int i = 0; i < 4; i++)
        get(1);
}
static void begin_overrun(void) {
    scene();
    start(16, 11);
    follow();
    for (int i = 0; i < 5; i++)
        put(1);
    explore(read_four);
}
/* As that, two elements copied and validated together. */
static void read_two(void) {
    r = r_kept;
    get(2);
    get(2);
}
static void begin_batch(void) {
    scene();
    start(16, 11);
    follow();
    put(2);
    put(1);
    explore(read_two);
}
/* What was reserved and not published has been touched: a smaller reservation does not take it back. */
static void begin_reserve(void) {
    uint64_t words[SLOTS / 8] = {0};
    scene();
    start(16, 11);
    follow();
    put(2);
    CORE(writer_reserve)(&w, 2);
    memcpy(CORE(writer_slot)(&w, 0), words, w.size);
    memcpy(CORE(writer_slot)(&w, 1), words, w.size);
    put(1);
    explore(read_four);
}
/* A new life under another epoch, without a stop between: nothing of it is taken for the old one's. F3 and F2, S2, L1.
 */
static void begin_restart(void) {
    scene();
    start(16, 11);
    follow();
    follows = 1;
    put(2);
    start(8, 22);
    put(1);
    explore(read_two);
}
/* A reader that comes while the writer starts anew, with another size: F3 and F4, S2 and L1. */
static void read_once_more(void) {
    r = r_kept;
    if (get(4) == STATUS(EPOCH_CHANGED))
        get(4);
}
static void begin_sync(void) {
    scene();
    start(16, 11);
    put(1);
    start(8, 22);
    put(1);
    explore(read_once_more);
}
/* A reader that is overrun while the writer starts anew: what is lost is the old epoch's, and none of it the new one's. */
static void read_overrun(void) {
    r = r_kept;
    if (get(1) == STATUS(OVERRUN_DETECTED) && r.lost < 2) /* two were published before the third was announced */
        weak_fail("a loss of another epoch", r.lost, r.rc);
}
static void begin_overrun_restart(void) {
    scene();
    start(16, 11);
    follow();
    put(2);
    put(1);
    start(8, 22);
    put(1);
    explore(read_overrun);
}
/* The same epoch once more: what was seen is taken back, zeros are never delivered. */
static void begin_again(void) {
    scene();
    start(16, 11);
    follow();
    follows = same = 1;
    put(1);
    put(1);
    start(16, 11);
    explore(read_two);
}
static void read_one(void) {
    r = r_kept;
    get(1);
}
/* The same, and the new life announces and writes an element, and publishes none: nobody gets a byte of that. */
static void begin_again_announced(void) {
    uint64_t other[SLOTS / 8] = {1, 2};
    scene();
    start(16, 11);
    follow();
    follows = same = 1;
    put(1);
    start(16, 11);
    CORE(writer_reserve)(&w, 1);
    memcpy(CORE(writer_slot)(&w, 0), other, w.size);
    explore(read_one);
}
/* Another epoch whose life has more than the ring holds: no element of the one before is lost by that. */
static void begin_restart_overrun(void) {
    scene();
    start(16, 11);
    follow();
    put(1);
    start(8, 22);
    follows = 1;
    for (int i = 0; i < 5; i++)
        put(1);
    explore(read_one);
}
/* An overrun and then the same epoch: what is lost is not counted from one life to the other. */
static void begin_again_overrun(void) {
    scene();
    start(16, 11);
    follow();
    put(1);
    weak_thread(READER);
    if (get(1) != STATUS(SUCCESS))
        weak_fail("not read", r.rc, 0);
    weak_thread(WRITER);
    for (int i = 0; i < 4; i++)
        put(1);
    same = 1;
    start(16, 11);
    explore(read_one);
}
/* The same, of a reader that had seen nothing before it looks: two looks at WC are of one life, or tell of another. */
static void begin_again_behind(void) {
    scene();
    start(16, 11);
    follow();
    for (int i = 0; i < 3; i++)
        put(1);
    same = 1;
    start(16, 11);
    explore(read_one);
}
/* Draining goes back only where it synchronises anew. */
static void drain_one(void) {
    r = r_kept;
    uint64_t rc = r.rc, epochs = r.epochs;
    CORE(reader_drain)(&r);
    if (r.epochs != epochs)
        weak_count("synchronised");
    else if (r.rc < rc)
        weak_fail("a position that went back", r.rc, rc);
    else
        weak_count("drained");
}
static void begin_again_drain(void) {
    scene();
    start(16, 11);
    follow();
    put(1);
    weak_thread(READER);
    if (get(1) != STATUS(SUCCESS))
        weak_fail("not read", r.rc, 0);
    weak_thread(WRITER);
    same = 1;
    start(16, 11);
    explore(drain_one);
}

/* A reader sleeps when there is nothing to tell, and never beyond that: F5, F6, and the sequence. */
static uint32_t stop;
static void wait_for_it(void) {
    r = r_kept;
    CORE(reader_wait)(&r, UINT64_C(1) << 62, &stop);
    weak_count("told");
}
static void wait_for_any(void) {
    TYPE(reader_t) *readers[1] = {&r};
    TYPE(waitset_t) set = {.readers = readers, .n = 1};
    r = r_kept;
    r.watch_stop = &stop;
    CORE(readers_wait)(&set, UINT64_C(1) << 62);
    weak_count("told");
}
static void publish_one(void) {
    w = w_kept;
    put(1);
}
static void start_epoch(void) {
    w = w_kept;
    CORE(writer_start)(&w, 33);
}
static void stop_epoch(void) {
    w = w_kept;
    CORE(writer_stop)(&w);
}
static void nobody_sleeps(void) {
    if (weak_asleep(READING))
        weak_fail("the reader sleeps on what it was not told of: elements, epoch", w.wc, w.epoch);
    if (w.wakes != w_kept.wakes)
        weak_count("woken");
}
static void explore_both(void (*writing)(void), void (*waiting)(void)) {
    void (*const bodies[])(void) = {writing, waiting, nobody_sleeps};
    r_kept = r;
    w_kept = w;
    weak_explore(bodies, 2);
}
static void scene_asleep(void) {
    scene_with_bell();
    start(16, 11);
    weak_thread(READING);
    if (get(1) != STATUS(EPOCH_CHANGED))
        weak_fail("not synchronised", r.epoch, 0);
    weak_thread(WRITER);
}
static void begin_bell(void) {
    scene_asleep();
    explore_both(publish_one, wait_for_it);
}
static void begin_bell_start(void) {
    scene_asleep();
    explore_both(start_epoch, wait_for_it);
}
static void begin_bell_stop(void) {
    scene_asleep();
    explore_both(stop_epoch, wait_for_it);
}

/* A counter that went back for good is waited for once, however many looks it takes to believe it. */
static void settle_twice(void) {
    const uint64_t look = 3500000; /* of weak_clock */
    uint64_t start;
    r = r_kept;
    start = now_ns();
    if (!CORE(reader_intact)(&r))
        CORE(reader_recover)(&r);
    if (r.unsettled == 2)
        weak_count("waited");
    if (now_ns() - start > __pyx_v_8muenfast_5_ring_SETTLE_NS + 4 * look)
        weak_fail("waited more than once: looks, of them given up", r.unsettled, r.given_up_ns);
}
static void begin_settle(void) {
    uint64_t available;
    scene();
    start(16, 11);
    put(1);
    follow();
    weak_thread(READER);
    if (CORE(reader_peek)(&r, &available) != STATUS(SUCCESS))
        weak_fail("nothing there", available, 0);
    weak_thread(WRITER);
    start(16, 11);
    explore(settle_twice);
}

static void begin_bells(void) {
    scene_asleep();
    explore_both(publish_one, wait_for_any);
}

/* The guard's table: the handler never takes one mapping's start for another's length. */
static char *const FIRST = (char *)0x10000000, *const SECOND = (char *)0x20000000;
static void *replaced(void *start, size_t length) {
    weak_count("replaced");
    if (start == FIRST ? length != 0x1000 : start != SECOND || length != 0x3000)
        weak_fail("replaced what is not one mapping: start, length", (uintptr_t)start, length);
    return start;
}
static void ignore(int number) { (void)number; }
static void fault(char *at) {
    siginfo_t info;
    memset(&info, 0, sizeof info);
    info.si_code = 1;
    info.si_addr = at;
    weak_on_mmap = replaced;
    guard_previous.sa_flags = 0;
    guard_previous.sa_handler = ignore;
    guard_inside = guard_passed = 0;
    guard_on_sigbus(SIGBUS, &info, NULL);
    weak_on_mmap = NULL;
}
static void fault_in_first(void) { fault(FIRST + 0x2800); }
static void fault_in_second(void) { fault(SECOND + 0x2800); }
static void tables(void) {
    uint32_t *a;
    scene();
    memset(guard_table, 0, 2 * sizeof guard_table[0]);
    guard_high = 0;
    weak_share(&guard_table[0], 2 * offsetof(guard_entry, broken));
    weak_share(&guard_high, sizeof guard_high);
    a = guard_add(SECOND, 0x3000);
    guard_remove(a);
    a = guard_add(FIRST, 0x1000);
    guard_remove(a);
    a = guard_add(SECOND, 0x3000);
    signal(SIGBUS, SIG_DFL);
}
static void begin_guard(void) {
    tables();
    explore(fault_in_second);
}
static void begin_guard_old(void) {
    tables();
    explore(fault_in_first);
}

const scenario ring_scenarios[] = {
    {"overrun", begin_overrun, {"delivered", "overrun", "no data"}},
    {"batch", begin_batch, {"delivered", "overrun", "no data"}},
    {"reserve", begin_reserve, {"delivered", "overrun", "no data"}},
    {"overrun-restart", begin_overrun_restart, {"overrun", "synchronised", "inactive"}},
    {"restart", begin_restart, {"delivered", "synchronised", "inactive"}},
    {"sync", begin_sync, {"delivered", "synchronised", "inactive"}},
    {"again", begin_again, {"delivered", "synchronised"}},
    {"again-announced", begin_again_announced, {"delivered", "synchronised", "no data"}},
    {"again-overrun", begin_again_overrun, {"delivered", "overrun", "synchronised"}},
    {"restart-overrun", begin_restart_overrun, {"delivered", "synchronised", "inactive"}},
    {"again-behind", begin_again_behind, {"overrun", "synchronised"}},
    {"again-drain", begin_again_drain, {"drained", "synchronised"}},
    {"bell", begin_bell, {"told", "woken"}},
    {"bell-start", begin_bell_start, {"told", "woken"}},
    {"bell-stop", begin_bell_stop, {"told", "woken"}},
    {"bells", begin_bells, {"told", "woken"}},
    {"settle", begin_settle, {"waited"}},
    {"guard", begin_guard, {"replaced"}},
    {"guard-old", begin_guard_old, {NULL}},
    {NULL, NULL, {NULL}},
};
