/* The table of marks on the machine of weak.h: who receives, and who ends a child.
 *
 * This file is compiled so that its plain accesses are watched.
 */
#include "weak.h"

#include "_marks.h"

enum { MARK = 1 };
static uint32_t entries[MARK + 1];
static mark_table_t t = {entries, MARK, 0};
static uint64_t child; /* what the number in the table stands for: 1 while it may be used */

/* Two turns; a number that was found is used until the turn ends. */
static void receive(void) {
    for (int i = 0; i < 2; i++) {
        marks_enter(&t);
        if (marks_child(&t, MARK)) {
            if (child != 1)
                weak_fail("a child is used behind its end: turn, child", (uint64_t)i, child);
            weak_count("used");
        } else
            weak_count("not there any more");
        marks_leave(&t);
    }
}

static void end_child(void) {
    store_relaxed32(&entries[MARK], 0);
    uint32_t then = marks_turn(&t);
    if (!marks_settled(&t, then)) {
        weak_count("has to wait");
        return;
    }
    weak_count(then & 1 ? "waited" : "need not wait");
    child = 0;
}

static void nobody_has_it(void) {
    if (marks_child(&t, MARK) != 0 || (t.turn & 1))
        weak_fail("entry, turn", marks_child(&t, MARK), t.turn);
}

static void reset_end(void) {
    entries[MARK] = 7;
    t.turn = 0;
    child = 1;
}

static void begin_end(void) {
    void (*const bodies[])(void) = {receive, end_child, nobody_has_it};
    weak_each(reset_end);
    weak_share(entries, sizeof entries);
    weak_share_plainly(&t.turn, sizeof t.turn);
    weak_share_plainly(&child, sizeof child);
    weak_explore(bodies, 2);
}

const scenario marks_scenarios[] = {
    {"marks", begin_end, {"used", "not there any more", "has to wait", "waited", "need not wait"}},
    {NULL, NULL, {NULL}},
};
