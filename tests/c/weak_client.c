/* The client's threads on the machine of weak.h: who issues, who takes the answers, who waits for one.
 *
 * This file is compiled so that its plain accesses are watched.
 */
#include "weak.h"

#include CLIENT_SOURCE

#define RING(name) __pyx_f_8muenfast_5_ring_##name

enum { FIRST = 0, SECOND = 1, REQUEST_BYTES = 64 + 2 * sizeof(block_event),
       ANSWER_BYTES = 64 + 4 * sizeof(block_event), BASE = 100, EPOCH = 5 };
static CLIENT_TYPE(client_t) c;
static CLIENT_TYPE(queue_t) q;
static CLIENT_TYPE(blocking_t) b;
static CLIENT_TYPE(io_t) io[2];
static struct __pyx_t_8muenfast_5_ring_writer_t w;
static uint64_t requests[REQUEST_BYTES / 8 + 1], answers[ANSWER_BYTES / 8 + 1];
static uint8_t pages[2][BLOCK_SIZE];
static int ended[2];
static uint64_t window;

/* F7 and F8, and `done`: one thread's answer ends another's sleep. A front end's thread takes the answers. */
static void wait_for_it(void) {
    CLIENT_FUNCTION(client_await)(&c, &b, UINT64_C(1) << 62);
    if (b.error != -5)
        weak_fail("not the request's result", (uint64_t)-b.error, 0);
    weak_count("told");
}
static void end_it(void) {
    CLIENT_FUNCTION(blocking_done)(&io[0]);
}
static void nobody_sleeps(void) {
    if (weak_asleep(SECOND))
        weak_fail("a caller sleeps although its request is done", 0, 0);
}
static void reset_await(void) {
    memset(&b, 0, sizeof b);
    b.c = &c;
    b.left = 1;
    c.turn = c.sleepers = 0;
}
static void begin_await(void) {
    void (*const bodies[])(void) = {end_it, wait_for_it, nobody_sleeps};
    CLIENT_BINDINGS
    memset(&c, 0, sizeof c);
    memset(io, 0, sizeof io);
    c.background = 1;
    c.state = CLIENT_CONSTANT(CLIENT_READY);
    io[0].user = &b;
    io[0].error = -5;
    weak_each(reset_await);
    weak_share_plainly(&b, sizeof b);
    weak_share_plainly(&c.turn, sizeof c.turn);
    weak_share_plainly(&c.sleepers, sizeof c.sleepers);
    weak_explore(bodies, 2);
}

/* The entries, `head` and `tail`: one thread issues two requests while another takes answers, some of which a hostile
 * server gave before it was asked. */
static void finished(CLIENT_TYPE(io_t) *which) {
    if (ended[which - io]++)
        weak_fail("a request that ends twice", (uint64_t)(which - io), 0);
    weak_count("ended");
}
static void answer(uint32_t number) {
    uint64_t event[515] = {0};
    block_event_header h = {EVENT_READ, 0, number, 1, BASE + number};
    memcpy(event, &h, sizeof h);
    RING(writer_reserve)(&w, 1);
    memcpy(RING(writer_slot)(&w, 0), event, sizeof event);
    RING(writer_publish)(&w, 1);
}
static void reset_issue(void) {
    uint64_t n;
    memset(&c, 0, offsetof(CLIENT_TYPE(client_t), entries)); /* of these two are in use, and nothing follows them */
    memset(c.entries, 0, 2 * sizeof c.entries[0]);
    memset(ended, 0, sizeof ended);
    memset(io, 0, sizeof io);
    RING(writer_init)(&w, (uint8_t *)answers, sizeof answers, sizeof(block_event), 8);
    RING(writer_start)(&w, EPOCH);
    RING(writer_init)(&c.w, (uint8_t *)requests, sizeof requests, sizeof(block_event), 7);
    RING(writer_start)(&c.w, 6);
    RING(reader_init)(&c.r, (const uint8_t *)answers, sizeof answers, sizeof(block_event), 8);
    RING(reader_peek)(&c.r, &n);
    c.state = CLIENT_CONSTANT(CLIENT_READY);
    c.window = (uint32_t)window;
    c.depth = 1024;
    c.base = BASE;
    c.server = EPOCH;
    memset(&q, 0, sizeof q);
    q.client = &c;
    q.block_size = BLOCK_SIZE;
    c.queues = &q;
    c.nqueues = 1;
    c.issue = CLIENT_FUNCTION(client_issue);
    c.reap = CLIENT_FUNCTION(client_reap);
    for (int i = 0; i < 2; i++) {
        io[i].kind = 0 /* IO_READ */;
        io[i].nblocks = 1;
        io[i].block = (uint64_t)i;
        io[i].buf = pages[i];
        io[i].done = finished;
    }
    answer(0);
    answer(1);
}
static void submit(void) {
    CLIENT_FUNCTION(client_submit)(&q, &io[0]);
    CLIENT_FUNCTION(client_submit)(&q, &io[1]);
}
static void reap(void) {
    CLIENT_FUNCTION(client_reap)(&c);
    answer(0);
    answer(1);
    CLIENT_FUNCTION(client_reap)(&c);
}
static void books(void) {
    if (c.tail > c.head || c.head - c.tail > window)
        weak_fail("head and tail", c.head, c.tail);
    for (uint64_t n = 0; n < c.head; n++) {
        if (!ended[n] && c.tail > n)
            weak_fail("counted as answered: request, tail", n, c.tail);
        if (!ended[n])
            weak_count("in flight");
    }
}
static void begin_issue(void) {
    void (*const bodies[])(void) = {submit, reap, books};
    CLIENT_BINDINGS
    weak_each(reset_issue);
    weak_share_plainly(&c, offsetof(CLIENT_TYPE(client_t), n)); /* not the counters */
    weak_share_plainly(&q, offsetof(CLIENT_TYPE(queue_t), n));
    weak_share_plainly(c.entries, 2 * sizeof c.entries[0]);
    weak_share_plainly(io, sizeof io);
    weak_explore(bodies, 2);
}
static void begin_issue_one(void) {
    window = 1;
    begin_issue();
}
static void begin_issue_two(void) {
    window = 2;
    begin_issue();
}

const scenario client_scenarios[] = {
    {"await", begin_await, {"told"}},
    {"issue", begin_issue_two, {"ended", "in flight"}},
    {"issue-full", begin_issue_one, {"ended", "in flight"}},
    {NULL, NULL, {NULL}},
};
