/* The client's blocking calls on the machine of weak.h: one thread's answer ends another's sleep. */
#include "weak.h"

#include CLIENT_SOURCE

enum { ENDING = 0, WAITING = 1 };
static CLIENT_TYPE(client_t) c;
static CLIENT_TYPE(blocking_t) b;
static CLIENT_TYPE(io_t) io;

static void wait_for_it(void) {
    CLIENT_FUNCTION(client_await)(&c, &b, UINT64_C(1) << 62);
    weak_count("told");
}
static void end_it(void) {
    b.left = 1;
    CLIENT_FUNCTION(blocking_done)(&io);
}
static void nobody_sleeps(void) {
    if (weak_asleep(WAITING))
        weak_fail("a caller sleeps although its request is done", 0, 0);
}
/* F7 and F8. A front end's thread takes the answers, as with `background`. */
static void begin_await(void) {
    void (*const bodies[])(void) = {end_it, wait_for_it, nobody_sleeps};
    CLIENT_BINDINGS
    memset(&c, 0, sizeof c);
    memset(&b, 0, sizeof b);
    memset(&io, 0, sizeof io);
    c.background = 1;
    c.state = CLIENT_CONSTANT(CLIENT_READY);
    b.c = &c;
    b.left = 1;
    io.user = &b;
    weak_share(&b.done, sizeof b.done);
    weak_share(&c.turn, sizeof c.turn);
    weak_share(&c.sleepers, sizeof c.sleepers);
    weak_explore(bodies, 2);
}

const scenario client_scenarios[] = {
    {"await", begin_await, {"told"}},
    {NULL, NULL, {NULL}},
};
