"""usage: tools/mutants.py [--list] [--everything] [--arm64] [NAME ...]

Removes fences, orderings and re-checks from the cores, one at a time, in a copy of the tree under build/mutants,
builds what it touched there, and runs the tests that are meant to notice. NAME: only mutations with that in their
name. --everything: all ring and block tests, instead of the named ones, for what is said to be hidden from them.
--arm64: instead of testing, cross-compiles (no more) and says which barriers the code loses with each ordering.

Each line of the table says what was removed and who caught it: a test, or where x86 (or the width of the window)
hides it from tests that run on the machine, the scenario of tests/test_memory_model.py. Exit status 1 where a
mutation is caught by nothing (those listed as spare, with a reason, need not be), the unmutated tree fails, or the
text to be replaced does not stand in its function exactly as often as it is said to.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "mutants"
MODEL = "tests/test_memory_model.py"
LIMIT = 400  # seconds for the tests of one mutation; one test has 45, and has failed then
CROSS = os.environ.get("CROSS_CC", "aarch64-linux-gnu-gcc")
DIRECTIVES = "boundscheck=False,wraparound=False,cdivision=True,initializedcheck=False"
BARRIER = re.compile(r"^\s+(dmb\s+\w+|ldar|ldapr|stlr|ldaxr|stlxr|swpal|ldaddal)\b", re.MULTILINE)
RING = ("tests/test_ring.py", "tests/test_ring_model.py", "tests/test_ring_hostile.py", "tests/test_ring_stress.py")
SERVER = ("tests/test_blk_server.py",)
CLIENT = ("tests/test_blk_client.py",)
BUFFER = ("tests/test_blk_buffer.py",)
FILES = ("tests/test_files.py",)
SLOW = ("tests/test_slow_disks.py",)
USER = ("tests/test_user.py",)
FAULTS = ("tests/test_faults.py",)
SHARED = ("tests/test_buffer_client.py",)
FRONT = ("tests/test_fuse_uring.py", "tests/test_pump.py")
ATTACH = ("tests/test_attach.py",)
CRASH = "tests/test_crash.py::TestPowerLoss::test_nothing_that_was_fsynced_is_lost"
COPIES = ("tests/test_copies.py",)
GATHER = tuple(f"tests/test_packets.py::{name}" for name in (
    "test_packets_gather_where_more_come_that_way", "test_a_dialogue_does_not_wait",
    "test_packets_that_are_few_do_not_gather",
    "test_a_load_that_slows_down_is_tried_at_once", "test_a_trial_with_a_break_is_none",
    "test_bursts_are_tried_less_and_less"))
NET = ("tests/test_net_frames.py", "tests/test_net_offload.py")
EVERYTHING = (*RING, *SERVER, *CLIENT)


@dataclass(frozen=True)
class Mutation:
    """What is replaced, where, and who is to notice."""

    name: str
    function: str          # in whatever file of src/muenfast
    old: str
    new: str
    tests: tuple[str, ...] = ()     # run on the machine as it is
    model: tuple[str, ...] = ()     # scenarios of the memory model
    count: int = 1
    spare: str = ""        # why it may survive

    @property
    def orders(self) -> bool:
        """Whether it is a fence or an ordering."""
        return self.old.startswith(("fence_", "/", "atomic_"))


def relaxed(name: str, function: str, word: str, *, model: tuple[str, ...] = (), tests: tuple[str, ...] = (),
            count: int = 1, spare: str = "", call: str = "(load_acquire|store_release)") -> Mutation:
    """An acquire load or release store of that word, made relaxed."""
    return Mutation(name, function, f"/{call}(32|64)(?=\\({re.escape(word)})", "~relaxed", tests, model, count, spare)


def fence(name: str, function: str, kind: str, *model: str) -> Mutation:
    return Mutation(name, function, f"fence_{kind}()", "pass", (), model)


PIECES = ("tests/test_blk_server.py::test_a_client_that_stores_its_counters_in_pieces",
          "tests/test_blk_client.py::test_a_server_that_stores_its_counters_in_pieces")
MUTATIONS = [
    # ------------------------------------------------------------ fences
    fence("F1", "writer_reserve", "release", "overrun"),
    fence("F2", "reader_intact", "acquire", "overrun"),
    fence("F2' server", "server_intact", "acquire", "server-memory", "server-file"),
    fence("F2' forgotten", "rewritten", "acquire", "server-forgotten"),
    fence("F3", "writer_start", "release", "restart"),
    fence("F4", "reader_sync", "acquire", "sync"),
    fence("F5", "ring", "seq_cst", "bell", "bell-start", "bell-stop"),
    fence("F6", "reader_wait", "seq_cst", "bell"),
    fence("F6' bells", "readers_wait", "seq_cst", "bells"),
    Mutation("bells: waiters", "readers_wait", "store_relaxed32(&r.bell.waiters, 1)", "pass", (), ("bells",)),
    Mutation("bells: the last look", "readers_wait", "before the last look\n        if any_ready(set):",
             "before the last look\n        if False:", (), ("bells",)),
    Mutation("settling: another epoch", "reader_settled", "if load_relaxed64(&r.hdr.epoch) != r.epoch:", "if False:",
             (), ("restart", "sync")),
    Mutation("settling is bounded", "reader_settled",
             "if r.given_up_ns != 0 and start - r.given_up_ns < r.settle_ns:", "if False:", (), ("settle",)),
    relaxed("bells: the sequence's load", "readers_wait", "&r.bell.seq",
            spare="not noticed, and needed: the machine does no load behind a later store of the same thread"),
    fence("F7", "wake_callers", "seq_cst", "await"),
    fence("F8", "client_await", "seq_cst", "await"),
    Mutation("F9", "turn_enter", "fence_seq_cst();", ";", (), ("marks",)),
    Mutation("F10", "turn_now", "fence_seq_cst();", ";", (), ("marks",)),
    Mutation("marks: an odd turn is waited for", "turn_over", "!(then & 1) ||", "1 ||", (), ("marks",)),
    Mutation("guard: fence of the handler", "guard_on_sigbus", "atomic_thread_fence(memory_order_acquire);", ";",
             (), ("guard", "guard-old")),
    Mutation("guard: fence of guard_add", "guard_add", "atomic_thread_fence(memory_order_release);", ";", (),
             ("guard", "guard-old")),
    # ------------------------------------------------------------ orderings
    relaxed("S1", "writer_publish", "&w.hdr.wc", model=("overrun", "batch")),
    relaxed("S1, the other side", "reader_settled", "counter", count=2, model=("overrun", "batch")),
    relaxed("S2", "writer_start", "&w.hdr.epoch", call="(store_release)", model=("restart", "sync")),
    relaxed("L1", "reader_sync", "&r.hdr.epoch", call="(load_acquire)", model=("restart", "sync")),
    Mutation("guard: base stored", "guard_add", "atomic_store_explicit(&g->base, base, memory_order_release)",
             "atomic_store_explicit(&g->base, base, memory_order_relaxed)", (), ("guard", "guard-old")),
    Mutation("guard: base loaded", "guard_on_sigbus", "atomic_load_explicit(&g->base, memory_order_acquire)",
             "atomic_load_explicit(&g->base, memory_order_relaxed)", (), ("guard", "guard-old")),
    relaxed("marks: a turn begins", "turn_enter", "turn", model=("marks",)),
    relaxed("marks: a turn ends", "turn_leave", "turn", model=("marks",)),
    relaxed("marks: the turn behind a change", "turn_now", "turn", model=("marks",)),
    relaxed("marks: another turn", "turn_over", "turn", model=("marks",)),
    relaxed("S3", "client_issue", "&e.state", model=("issue", "issue-full")),
    relaxed("S3, the other side", "client_reap", "&e.state", call="(load_acquire)", model=("issue", "issue-full")),
    relaxed("an entry is free", "client_settle", "&matched[k].state", call="(store_release)", model=("issue", "issue-full"),
            spare="the reaper is one thread, and `tail` orders it for the issuer"),
    relaxed("head", "client_issue", "&c.head", model=("issue", "issue-full")),
    relaxed("head, the other side", "client_settle", "&c.head", model=("issue", "issue-full")),
    relaxed("tail", "client_settle", "&c.tail", model=("issue-full",)),
    relaxed("tail, the other side", "client_room", "&c.tail", model=("issue-full",)),
    relaxed("done", "blocking_done", "&b.done", model=("await",)),
    relaxed("done, the other side", "client_await", "&b.done", count=2, model=("await",)),
    relaxed("peek's epoch", "reader_peek", "&r.hdr.epoch",
            spare="equal to the epoch synchronised with it orders nothing; another one is loaded again"),
    relaxed("recover's epoch", "reader_recover", "&r.hdr.epoch",
            spare="not noticed, and needed: an epoch that is loaded late makes a restart a false overrun"),
    relaxed("the end of an epoch", "writer_stop", "&w.hdr.epoch", spare="what an ended epoch published is S1's"),
    relaxed("the sequence's load", "reader_wait", "&r.bell.seq",
            spare="not noticed, and needed: the machine does no load behind a later store of the same thread"),
    # ------------------------------------------------------------ the writer
    Mutation("epoch 0 before a start", "writer_start", "store_relaxed64(&w.hdr.epoch, 0)", "pass", (), ("restart",)),
    Mutation("WSC is never lowered", "writer_reserve", "if <int64_t>(wsc - w.wsc) > 0:", "if True:", (), ("reserve",)),
    Mutation("WSC before the elements", "writer_reserve", "store_relaxed64(&w.hdr.wsc, wsc)", "pass", RING),
    Mutation("slots are zeroed", "writer_start", "memset(w.slots, 0, w.elements * w.size + w.rest)", "pass", RING),
    Mutation("ring: publish", "writer_publish", "    ring(w)\n", "", RING),
    Mutation("ring: start", "writer_start", "    ring(w)\n", "", (), ("bell-start",)),
    Mutation("ring: stop", "writer_stop", "    ring(w)\n", "", (), ("bell-stop",)),
    Mutation("waiters are taken back", "bell_kick", "exchange_acqrel32(&bell.waiters, 0)", "pass", RING),
    Mutation("the sequence moves", "bell_kick", "fetch_add_acqrel32(&bell.seq, 1)", "pass", RING, ("bell",)),
    # ------------------------------------------------------------ the reader: header
    *(Mutation(f"header: {what}", "acceptable", old, new, RING) for what, old, new in (
        ("transport", "transport == SHMSTREAM_TRANSPORT and ", ""),
        ("protocol 0", "protocol != 0 and ", ""),
        ("size 0", "size != 0 and ", ""),
        ("elements 0", " and elements != 0", ""),
        ("protocol", "and (r.want_protocol == 0 or protocol == r.want_protocol)", ""),
        ("size", "and (r.want_size == 0 or size == r.want_size or size == r.sums_size and reserved == ACCEPT_MAGIC)", ""),
        ("elements fit", "and elements <= r.capacity // size)", ")"))),
    Mutation("sync: epoch once more", "reader_sync", "if load_relaxed64(&r.hdr.epoch) != epoch:", "if False:", (),
             ("sync",)),
    Mutation("sync: epoch settles", "reader_sync", "cpu_pause()", "pass", PIECES),
    # ------------------------------------------------------------ the reader: counters
    Mutation("peek: epoch", "reader_peek", "if r.epoch == 0 or wc != r.epoch or out_of_patience(r):",
             "if r.epoch == 0 or out_of_patience(r):", RING),
    *(Mutation(f"quarantine: {what}", function, old, new, ("tests/test_quarantine.py",)) for what, function, old, new in (
        ("a limit", "out_of_patience", "r.lately <= r.patience", "r.lately < r.patience"),
        ("the epoch", "reader_sync", " or epoch == r.shut", ""),
        ("what may be read", "reader_ready", "    if epoch == r.shut:\n        return r.epoch != 0\n", ""),
        ("a second", "reader_blame", "if now - r.blamed_ns > BLAME_NS:", "if False:"),
        ("read-only", "server_refused", "if error == -EINVAL:", "if True:"),
        ("the field", "event_fault", "return FAULT_KIND", "return FAULT_ID"))),
    Mutation("peek: WC < RC", "reader_peek", "if went_back(wc, r.wc):", "if False:", ("tests/test_ring.py",)),
    Mutation("peek: overrun", "reader_peek", "if behind > r.elements:", "if False:", RING),
    Mutation("peek: 2^64", "reader_peek", "if r.rc + behind < r.rc and r.rc + behind != 0:", "if False:", RING),
    Mutation("went back: 2^64", "went_back", " and <int64_t>(now - before) < 0", "", RING),
    Mutation("counters settle", "reader_settled", "if not went_back(now, r.wc):", "if True:", PIECES),
    Mutation("copy: intact", "reader_copy", "if not reader_intact(r):", "if False:", RING),
    Mutation("intact: WSC", "reader_intact", "<= ahead <= r.elements", "<= ahead", RING),
    Mutation("intact: restart", "reader_intact", "r.wc - r.rc <= ahead <=", "ahead <=", RING, ("again-behind",)),
    Mutation("intact: WC", "reader_intact", " and not went_back(reader_settled(r, &r.hdr.wc), r.wc)", "", (),
             ("again-announced",)),
    Mutation("intact: epoch", "reader_intact", "if load_acquire64(&r.hdr.epoch) != r.epoch:", "if False:", (),
             ("restart",)),
    relaxed("intact: the epoch before the counters", "reader_intact", "&r.hdr.epoch", model=("again",)),
    Mutation("overrun: WC < RC", "reader_overrun", "if went_back(wc, r.wc) or ", "if ", (),
             ("again-overrun",)),
    Mutation("overrun: epoch", "reader_overrun", " or load_acquire64(&r.hdr.epoch) != r.epoch", "", (),
             ("restart-overrun",)),
    Mutation("recover: epoch", "reader_recover", "load_acquire64(&r.hdr.epoch) != r.epoch or ", "", (),
             ("restart",)),
    Mutation("recover: restart", "reader_recover", " or went_back(reader_settled(r, &r.hdr.wsc), r.wc)", "", RING),
    Mutation("drain: epoch", "reader_drain", " or load_acquire64(&r.hdr.epoch) != r.epoch", "", RING),
    Mutation("drain: restart", "reader_drain", "due = went_back(wc, r.wc)", "pass", RING, ("again-drain",)),
    Mutation("peek: WC once", "reader_peek", "        r.wc = wc  ", "        pass  ", (), ("again-behind",)),
    # ------------------------------------------------------------ the reader: sleep
    Mutation("wait: waiters", "reader_wait", "store_relaxed32(&r.bell.waiters, 1)", "pass", RING, ("bell",)),
    Mutation("wait: last look", "reader_wait", "            if reader_ready(r):\n                break\n", "", (),
             ("bell",)),
    Mutation("wait: sequence read late", "reader_wait", "futex_wait_ns(&r.bell.seq, seen, limit)",
             "futex_wait_ns(&r.bell.seq, load_acquire32(&r.bell.seq), limit)", (), ("bell",)),
    Mutation("wait: who rings", "reader_wait", " and load_relaxed64(&r.bell.ringer) == epoch", "", RING),
    *(Mutation(f"wait: in vain, {what}", function, old, new, ("tests/test_ringers.py",)) for what, function, old, new in (
        ("a limit", "reader_deaf", "return r.vain >= VAIN_MOST + (r.batches - r.vain_from)", "return False"),
        ("alone", "reader_wait", "            if now - before < limit and not reader_ready(r):\n"
         "                r.vain += 1\n        else:", "        else:"),
        ("together", "readers_wait", "heard[k].vain += 1", "pass"))),
    Mutation("guard: base once more", "guard_on_sigbus", " || atomic_load_explicit(&g->base, memory_order_relaxed) != base",
             "", (), ("guard", "guard-old")),
    # ------------------------------------------------------------ the server
    *(Mutation(f"request: {what}", "check_event", old, new, SERVER) for what, old, new in (
        ("valid", "if h.valid != 1 and not s.sums:", "if False:"),
        ("command", "return 0 if h.id == COMMAND_SYNC or h.id == COMMAND_SIZE else -EINVAL", "return 0"),
        ("kind", "if h.kind != EVENT_READ and h.kind != EVENT_WRITE:", "if False:"),
        ("block", "if h.id >= s.store.nblocks:", "if False:"),
        ("read-only", "if h.kind == EVENT_WRITE and s.store.read_only:", "if False:"))),
    Mutation("server intact: WSC", "server_intact", " and wsc - (s.r.rc + k) <= s.r.elements", "", (),
             ("server-memory", "server-file")),
    Mutation("server intact: its life", "server_intact", "server_life(s, &wsc) and wsc",
             "reader_settled(&s.r, &s.r.hdr.wsc)", (), ("server-file-restart",)),
    relaxed("server: the epoch before the counters", "server_life", "&s.r.hdr.epoch",
            model=("server-memory-again", "server-file-again")),
    Mutation("server: headers intact", "server_batch", "if not reader_intact(&s.r):", "if False:", (),
             ("server-memory",)),
    Mutation("server: headers of files intact", "server_take", "if not reader_intact(&s.r):", "if False:", (),
             ("server-file",)),
    Mutation("server: file writes intact", "server_launch", "if not server_intact(s, 0):", "if False:", (),
             ("server-file",)),
    Mutation("server: memory writes intact", "server_answer", "if not server_intact(s, first + k):", "if False:", (),
             ("server-memory",)),
    Mutation("server: answers to an old epoch", "server_life", " and load_acquire64(&s.r.hdr.epoch) == s.r.epoch", "",
             (), ("server-memory-restart",)),
    Mutation("server: answers to an old life", "server_life", "<int64_t>(wsc[0] - s.r.wc) >= 0 and ", "", (),
             ("server-overwritten",)),
    Mutation("server: answers to what is not published", "server_life",
             " and <int64_t>(reader_settled(&s.r, &s.r.hdr.wc) - s.r.wc) >= 0", "", (),
             ("server-memory-announced", "server-file-announced")),
    Mutation("server: over is over", "server_life", "s.over != s.r.epochs and ", "", (), ("server-caught-up",)),
    Mutation("server: over is told", "server_step", "if s.over == s.r.epochs:", "if False:", (), ("server-caught-up",)),
    Mutation("server: an earlier server's requests", "server_batch", "if <int64_t>(s.void_below - s.r.rc) > 0:",
             "if False:", SERVER),
    Mutation("server: a ring gone round", "server_step", "if s.void_below > s.r.elements:", "if False:", SERVER),
    Mutation("server: void requests are no loss", "server_step", "reader_forgive(&s.r)", "pass", SERVER),
    Mutation("server: the last request forgotten", "server_step", " and server_forgotten(s)", " and False", SERVER),
    Mutation("server forgotten: WSC", "rewritten",
             "if load_relaxed64(&r.hdr.wsc) - (r.rc - 1) > r.elements:", "if False:", SERVER,
             ("server-forgotten",)),
    Mutation("server: a run's blocks", "server_batch",
             "\n                    and server_check(s, k + run) == 0", "", SERVER),
    Mutation("server: response ring's size", "server_batch", "if n > s.w.elements:", "if False:", SERVER),
    Mutation("server: no old bytes under an error", "server_run_blocks", "if s.heads[first].kind == EVENT_READ:",
             "if False:", SERVER),
    Mutation("server: store taken away", "server_move",
             "return -EIO if store_broken(s.store) else 0", "return 0", SERVER),
    Mutation("files: cut short", "aio_completed", "op->error = -EIO; /* cut short", "op->error = 0; /* cut short", SERVER),
    Mutation("files: cut short, threads", "aio_execute", "return -EIO; /* cut short", "return 0; /* cut short", FILES),
    Mutation("files: what is under way on the same bytes", "aio_conflicts",
             "(op->start < start + length && start < op->start + op->length)", "false", FILES),
    Mutation("files: memory of what is under way", "aio_conflicts",
             "op->data < data + length && data < op->data + op->length", "false", BUFFER),
    Mutation("files: the old life's answers", "server_step", "f.leaving = True", "f.leaving = False", SLOW),
    Mutation("files: what waits is slept through", "server_take", "if k == 0:", "if False:", SLOW),
    Mutation("buffer: what waits is slept through", "buffer_take", "if k == 0:", "if False:", SLOW),
    Mutation("buffer: an overrun ends no life", "buffer_step", " and status != OVERRUN_DETECTED", "", SLOW),
    Mutation("files: a place that is taken is left out", "flights_room", "taken < AIO_MOST and ", "False and ", SLOW),
    Mutation("files: one by one", "server_finish", "if op.error != 0 and n > 1 and not op.final:", "if False:", SLOW),
    Mutation("faults: final", "server_finish", " and not op.final:", ":", FAULTS),
    Mutation("faults: final, buffer", "buffer_finish", " and not final:", ":", FAULTS),
    Mutation("faults: withheld", "aio_settle", "op->due != 0 && op->due > now_ns()", "false", FAULTS),
    Mutation("jobs: what a late one may change", "jobs_put", " || (changes && jobs_meets_adrift(q, start, length))", "",
             USER),
    Mutation("jobs: late", "aio_tick", "if (op->work->deadline > now)", "if (true)", USER),
    Mutation("jobs: a kept view keeps its stage", "stage_is_free", "if load_acquire32(&stage.views) == 0:",
             "if True:", USER),
    Mutation("jobs: a view's obj", "__getbuffer__", "if not self.lent:", "if False:", USER),
    Mutation("jobs: bytes instead of a filled buffer", "understood", "    if isinstance(found, (bytes",
             "    if False and isinstance(found, (bytes", USER),
    Mutation("jobs: a part for the whole", "understood", "and found != length", "and False", USER),
    Mutation("jobs: a child is no worker", "execute",
             "            if getpid() != self.process:\n                leave_child(error)\n", "", USER),
    Mutation("jobs: what is left runs", "jobs_forget", "store_relaxed32(&q->left, q->left + 1);", "", USER),
    Mutation("jobs: largest call", "server_launch", " and (run + 1) * BLOCK_SIZE <= s.store.most", "", USER),
    Mutation("jobs: largest call, buffer", "buffer_joined", " or next.length > together - length[0]", "", USER),
    Mutation("jobs: another one at work", "jobs_next", " || stalled", "", USER),
    Mutation("files: threads for each", "aio_next", "a->working[op->file] == AIO_THREADS", "false", SLOW),
    # ------------------------------------------------------------ network interfaces
    Mutation("net: whole, merged", "receiver_merge", "if not receiver_place(v, k, &wrong):",
             "receiver_place(v, k, &wrong)\n            if False:", NET),
    Mutation("net: whole", "receiver_batch", "if not reader_intact(&v.r):", "if False:", NET),
    Mutation("net: which IP", "receiver_place", "not frame_agrees(h, coalesce_version(&v.c))", "False", NET),
    Mutation("net: cut short", "frame_finish", "own < 0 || (uint32_t)own > n", "own < 0", NET),
    Mutation("net: nothing of an earlier one", "frame_finish", "if (used > n)", "if (false)", NET),
    Mutation("net: a reader that stands", "sender_room", "now - s.full_since >= STUCK_NS", "False", NET),
    Mutation("net: what is pending goes down", "sender_relink", "s.left = s.cut.left = 0", "pass", NET),
    Mutation("net: marks without a word", "sender_limit", " or s.mark > s.marks", "", NET),
    Mutation("net: told once", "sender_tell", "s.told or ", "", NET),
    Mutation("net: told seldom", "sender_tell", " or not pmtu_allowed(&s.bucket, now_ns())", "", NET),
    Mutation("net: a tap's copies", "sender_drain", "s.news", "s.spill", NET),
    Mutation("net: untaken", "sender_leave", "count64(&s.n.untaken, sender_untaken(s, epoch))", "pass", NET),
    Mutation("net: a port that ends", "remove", "turn_over(&self.turn, sender) and ", "",
             ("tests/test_net_offload.py::test_a_port_is_removed_once_nobody_uses_it",)),
    Mutation("net: where the one before was", "receiver_join", "reader_goto(&v.r, v.left_rc)", "pass",
             ("tests/test_net.py::test_who_joins_loses_nothing_that_was_others",)),
    Mutation("gather: nothing comes", "gather_now", "g->phase != GATHER_PLAIN && packets == 0", "false", GATHER),
    Mutation("gather: a break", "gather_now", "passed >= 2 * GATHER_WINDOW_NS", "false", GATHER),
    Mutation("gather: few packets", "gather_now", "rate >= GATHER_FROM && ", "", GATHER),
    Mutation("gather: a slower load", "gather_now", " || rate < g->plain - g->plain / 4", "", GATHER),
    Mutation("gather: more than plain", "gather_now", "rate > g->plain + g->plain / 8", "true", GATHER),
    Mutation("gather: how long", "gather_holds", "g->holds *= 2", "g->holds = GATHER_HOLDS_NS", GATHER),
    Mutation("gather: nothing came in a trial", "gather_now", "if (g->phase == GATHER_TRIED)", "if (false)", GATHER),
    Mutation("gather: tried again", "gather_now", "if (now >= g->until)", "if (false)", GATHER),
    # ------------------------------------------------------------ the client
    Mutation("answer: in flight", "client_reap", "load_acquire32(&e.state) == ENTRY_ISSUED and ", "", CLIENT),
    Mutation("answer: priv", "client_reap", "e.priv == h.priv and ", "", CLIENT),
    Mutation("answer: kind", "client_reap", "e.kind == h.kind and ", "", CLIENT),
    Mutation("answer: block", "client_reap", " and e.id == h.id", "", CLIENT),
    Mutation("answer: matched once", "client_reap", "e.state = ENTRY_MATCHED", "pass", CLIENT),
    Mutation("answer: caller gave up", "client_reap", " and e.io != NULL:", ":", CLIENT),
    Mutation("answer: intact", "client_reap", "if not reader_intact(&c.r):", "if False:", CLIENT),
    Mutation("answer: void, in flight again", "client_reap", "matched[k].state = ENTRY_ISSUED", "pass", CLIENT,
             spare="what follows is a new life, which issues whatever is not free; a batch that is void ends this one"),
    Mutation("answer: an errno", "client_settle", "errors[k] if -LINUX_ERRNO_MAX <= errors[k] <= 0 else -EIO", "errors[k]",
             CLIENT),
    Mutation("issue: window", "client_room", "c.window - (c.head - load_acquire64(&c.tail))", "c.window", CLIENT),
    Mutation("issue: depth", "client_room", "most - c.flying if c.flying < most and c.strays == 0 else 0", "c.window",
             CLIENT),
    Mutation("issue: the server that was checked", "client_room",
             " if load_relaxed64(&c.r.hdr.epoch) == c.server else 0", "", CLIENT),
    *(Mutation(f"size: {what}", "client_take_size", old, new, CLIENT) for what, old, new in (
        ("kind", "h.kind == EVENT_COMMAND and ", ""), ("command", "h.id == COMMAND_SIZE and ", ""),
        ("priv", "h.priv == c.base - 1 and ", ""), ("error", "found = h.error == 0", "found = True"),
        ("intact", "if not reader_intact(&c.r):", "if False:"))),
    Mutation("size: who rings", "client_introduced", " and load_acquire64(&c.r.bell.ringer) == c.r.epoch", "", CLIENT),
    Mutation("resume: the server that answered", "client_answered", "if load_acquire64(&c.r.hdr.epoch) != c.r.epoch:",
             "if False:", CLIENT),
    Mutation("await: done once more", "client_await", "            if load_acquire32(&b.done) == 0:\n    ", "", (),
             ("await",)),
    # ------------------------------------------------------------ checksums
    *(Mutation(f"checksum: {what}", function, old, new, (f"tests/test_checksums{where}.py",))
      for what, function, old, new, where in (
          ("a request's", "server_judge", "elif s.sums and not server_verify(s, h, k, block):", "elif False:", ""),
          ("an answer's", "client_reap", "if not client_sum(c, &h, k, data):", "if False:", ""),
          ("whose it was", "client_reap", "client_stray(c, wrong, unread + stale)", "client_stray(c, 0, 0)", ""),
          ("the number", "client_sum", "c.r.rc + k", "h.id", ""),
          ("beside a buffer", "buffer_judge", "elif s.sums and not buffer_right(s, h, seal):", "elif False:", "_buffer"),
          ("in the mirror", "buffer_right", "copy_taken(s.mirror + h.buffer_offset",
           "copy_taken(s.buffer + h.buffer_offset", "_buffer"),
          ("an element's", "receiver_take", "if v.sums and n >= 0 and", "if False and", "_net"),
          ("what a dead reader left", "sender_agree", "if missing and passed >= MISSING_NS:", "if False:", "_net"))),
    # ------------------------------------------------------------ the client with a buffer
    *(Mutation(f"shared answer: {what}", "shared_reap", old, new, SHARED) for what, old, new in (
        ("in flight", "load_acquire32(&e.state) == ENTRY_ISSUED and ", ""), ("tag", "e.priv == a.tag and ", ""),
        ("kind", "e.kind == a.kind and ", ""), ("device", " and e.device == a.device", ""),
        ("matched once", "e.state = ENTRY_MATCHED", "pass"), ("caller gave up", "if e.io != NULL:", "if True:"),
        ("its status", "-<int32_t>a.status if 1 < a.status <= 4095 else -EIO", "-<int32_t>a.status"))),
    *(Mutation(f"shared question: {what}", "shared_listen", old, "", SHARED) for what, old in (
        ("tag", "answers[k].tag == b.asks[i].tag and "), ("kind", "answers[k].kind == b.asks[i].kind\n"
                                                          "                    and "),
        ("device", "answers[k].device == b.asks[i].device and "))),
    Mutation("shared place: aligned", "shared_place", "align = block_size // b.unit", "align = 1", SHARED),
    Mutation("shared place: one owner", "shared_place", "shared_mark(b, at, n, True)", "pass", SHARED),
    Mutation("shared place: in the buffer", "shared_find", "return first if first + n <= end else NOWHERE", "return first",
             SHARED),
    Mutation("shared place: neighbours", "shared_place", "b.cursor = at + n", "b.cursor = 0", SHARED,
             spare="answers come in order, so the first free place is nearly as often the one behind the last"),
    Mutation("shared issue: the buffer is full", "shared_next", "return e.place != NOWHERE", "return True", SHARED),
    Mutation("shared issue: a share of the window", "shared_issue", "q.flying < most", "True", SLOW),
    Mutation("shared issue: blocks of one request", "shared_next",
             "min(<uint64_t>(io.nblocks - io.issued), q.most)", "min(<uint64_t>(io.nblocks - io.issued), 1 << 20)", SHARED),
    Mutation("shared issue: promised zeros", "shared_kind", " or io.kind == IO_DISCARD and q.clears", "", SHARED),
    # ------------------------------------------------------------ the server with a buffer
    Mutation("buffer: alignment", "check_request", " or (h.length | h.device_offset) & (d.block_size - 1) != 0", "",
             BUFFER),
    Mutation("buffer: the device's end", "check_request",
             "if h.device_offset > d.size or h.length > d.size - h.device_offset:",
             "if h.device_offset + h.length > d.size:", BUFFER),
    Mutation("buffer: the buffer's end", "check_request",
             "if h.buffer_offset > s.length or h.length > s.length - h.buffer_offset:",
             "if h.buffer_offset + h.length > s.length:", BUFFER),
    Mutation("buffer: the device's number", "check_request", "if h.device >= s.ndevices:", "if h.device > s.ndevices:",
             BUFFER),
    Mutation("buffer: a run on the device", "buffer_joined", " or next.device_offset != h.device_offset + length[0]", "",
             BUFFER),
    Mutation("buffer: a run in the buffer", "buffer_joined",
             "if h.kind != REQUEST_DISCARD and next.buffer_offset != h.buffer_offset + length[0]:", "if False:", BUFFER),
    Mutation("buffer: a run is checked", "buffer_joined", "check_request(s, next) != 0 or ", "", BUFFER),
    Mutation("buffer: what fails together", "buffer_run", "if together != 0 and run > 1:", "if False:", BUFFER),
    Mutation("buffer: an ended life", "buffer_answers", "load_acquire64(&s.r.hdr.epoch) != s.r.epoch or ", "",
             ("tests/test_blk_shm.py",)),
    Mutation("buffer: void requests", "buffer_batch", "if predecessors and buffer_over(s, h, s.r.rc + k):", "if False:",
             BUFFER),
    Mutation("buffer: a ring gone round", "buffer_begin", "if s.void_below > s.r.elements:", "if False:", BUFFER),
    Mutation("buffer: void requests are no loss", "buffer_step", "reader_forgive(&s.r)", "pass", BUFFER),
    Mutation("buffer: the last request forgotten", "buffer_step", " and rewritten(&s.r, &s.last, sizeof(s.last))",
             " and False", BUFFER),
    Mutation("buffer: taken away", "buffer_move", "return -EIO if load_acquire32(s.broken) != 0 else status",
             "return status", BUFFER),
    Mutation("buffer: a batch fits the response ring", "buffer_batch", "min(min(available, <uint64_t>BATCH), s.w.elements)",
             "min(available, <uint64_t>BATCH)", BUFFER),
    Mutation("buffer: room for SMART data", "buffer_smart", "SMART_SIZE > s.length - h.buffer_offset", "False", BUFFER),
    # ------------------------------------------------------------ calls
    Mutation("bounds: one piece", "place", "if at > size or length > size - at:", "if False:", CLIENT),
    Mutation("front: the target's depth", "arrive", " and load_relaxed32(&d.in_flight) + taken < d.depth", "", FRONT),
    Mutation("front: others' answers are looked for", "arrive", "take_foreign(d)", "pass", FRONT),
    Mutation("front: the pump is told of others' answers", "request_done", "c_write(d.wake, &one, sizeof(one))", "pass",
             FRONT),
    Mutation("front: what is read beside the ring", "arrive", "if not d.ring.watches:", "if False:", ATTACH,
             spare="FORGETs would pile up in the kernel; the end comes with the commands, too"),
    Mutation("front: what a write's answer says", "commit_move", "written.size = <uint32_t>size", "pass", FRONT),
    Mutation("front: libfuse gets the first argument", "process", "memcpy(payload(r) - first, r.entry.first, first)",
             "pass", FRONT),
    Mutation("front: a refusal is committed", "understand", "commit_move(d, r, min(status, 0), 0)", "pass", FRONT),
    Mutation("flush: the client answers it at once", "op_fsync", "if nothing:", "if True:", (f"{CRASH}[store+shm]",)),
    Mutation("flush: threads do none", "aio_execute", "n = fdatasync(fd);", "n = 0;", (f"{CRASH}[file-threads+shm]",)),
    Mutation("flush: io_uring does none", "aio_prepare", "io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);",
             "io_uring_prep_nop(sqe);", (f"{CRASH}[disk]",)),
    Mutation("copies: apart is far apart", "copy_timed", "g->cost[0] > COPY_FAR && ", "", COPIES),
    Mutation("copies: past the caches must pay", "copy_timed", " && 4 * g->cost[0] > 7 * g->cost[1]", "", COPIES),
    Mutation("copies: one interruption is no news", "copy_timed", "cost < 2 * old ? cost : 2 * old", "cost", COPIES),
    Mutation("copies: the rest of a piece", "copy_lines", "if (n != 0)", "if (0)", COPIES),
    Mutation("bounds: scattered", "scattered", "if at > self.nblocks or each > self.nblocks - at:", "if False:", CLIENT),
]


def sources(tree: Path) -> list[Path]:
    package = tree / "src/muenfast"
    return sorted(path for place in (package, package / "attach") for kind in ("*.pyx", "*.pxd", "*.h")
                  for path in place.glob(kind))


def bodies(path: Path, text: str, function: str) -> Iterator[tuple[int, int]]:
    """Where the definitions of that function begin and end."""
    if path.suffix == ".h":
        for found in re.finditer(rf"^static [^;\n]*\b{function}\([^;]*?\) \{{.*?^\}}$", text, re.MULTILINE | re.DOTALL):
            yield found.span()
        return
    for found in re.finditer(rf"^([ ]*)(?:cdef [^=\n]*?|def )\b{function}\((?:[^()]|\(\))*\)[^\n]*:\n", text, re.MULTILINE):
        end = re.compile(rf"^[ ]{{0,{len(found[1])}}}\S", re.MULTILINE).search(text, found.end())
        yield found.start(), end.start() if end else len(text)


def mutated(tree: Path, mutation: Mutation) -> tuple[Path, str]:
    """The file and its text with that replaced. Ends the program where it does not stand where it is said to."""
    found = [(path, text, span) for path in sources(tree) for text in [path.read_text()]
             for span in bodies(path, text, mutation.function)]
    if len(found) > 1:      # a property, perhaps, of that name
        found = [each for each in found if re.search(mutation.old[1:] if mutation.old.startswith("/") else
                                                     re.escape(mutation.old), each[1][slice(*each[2])])]
    if len(found) != 1:
        sys.exit(f"{mutation.name}: {mutation.function} is defined in {[path.name for path, _, _ in found]}")
    [(path, text, (start, end))] = found
    body = text[start:end]
    if mutation.old.startswith("/"):
        new, count = re.subn(mutation.old[1:], lambda m: m[0].replace("acquire", "relaxed").replace("release", "relaxed"),
                             body)
    else:
        new, count = body.replace(mutation.old, mutation.new), body.count(mutation.old)
    if count != mutation.count or new == body:
        sys.exit(f"{mutation.name}: {mutation.function} in {path.name} has that text {count} times, not {mutation.count}:"
                 f"\n{mutation.old}")
    return path, text[:start] + new + text[end:]


def apply(tree: Path, mutation: Mutation) -> str:
    """Replaces the text; the name of the file."""
    path, text = mutated(tree, mutation)
    path.write_text(text)
    return path.name


def copy(name: str) -> Path:
    """What is built and tested, without what was."""
    tree = PLACE / name
    tree.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("src", "tests", "tools"):
        shutil.copytree(ROOT / name, tree / name,
                        ignore=shutil.ignore_patterns("*.c", "*.so", "*.egg-info", "__pycache__")
                        if name == "src" else shutil.ignore_patterns("__pycache__", ".hypothesis"))
    return tree


def environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1", "MUENFAST_WERROR": "",
                         "MUENFAST_SANITIZE": "", "MUENFAST_COVERAGE": ""}


def run(tree: Path, *words: str, limit: float = 900) -> tuple[int | None, str]:
    """Exit status (None: the limit) and output. Everything started is gone afterwards, and what it shared, too."""
    with subprocess.Popen([sys.executable, *words], cwd=tree, env=environment(tree), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=limit)
            status: int | None = process.returncode
        except subprocess.TimeoutExpired:
            status = None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if status is None:
            output, _ = process.communicate()
    for left in Path("/dev/shm").glob(f"*mf{process.pid}*"):
        left.unlink(missing_ok=True)
    return status, output


def build(tree: Path) -> str:
    """Builds what is not up to date; an error's text."""
    status, output = run(tree, "setup.py", "-q", "build_ext", "--inplace")
    return output if status != 0 else ""


def noticed(tree: Path, tests: tuple[str, ...], limit: float = LIMIT) -> str:
    """The first test that fails, or how else the run ended badly; nothing where all passed."""
    with tempfile.TemporaryDirectory(prefix="mf") as scratch:   # short: sockets lie below
        status, output = run(tree, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider", "-o", "timeout=45",
                             "-o", "timeout_method=thread", "--basetemp", scratch, *tests, limit=limit)
    if status == 0:
        return ""
    if status is None:
        return f"no end within {limit} s"
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    if failed:
        return failed[1].removeprefix("tests/")
    hung = re.search(r"^.*File \".*/(test_\w+\.py)\", line \d+,? in (test_\w+)", output, re.MULTILINE)
    return f"{hung[1]}::{hung[2]} (time limit)" if hung else f"exit status {status}: {output[-200:]}"


def scenarios(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{MODEL}::test_no_execution_does_what_must_not_be[{name}]" for name in names)


def barriers(tree: Path, file: str) -> Counter[str]:
    """What orders memory in the arm64 code of the module that this file belongs to."""
    name = {".h": "_ring", ".pxd": "_blk"}.get(Path(file).suffix, Path(file).stem)
    if file in ("_marks.h", "_turns.h"):
        name = "_marks"
    code = tree / "arm64.c"
    subprocess.run([sys.executable, "-m", "cython", "-3", "-X", DIRECTIVES, "-I", "src", "-o", code,
                    f"src/muenfast/{name}.pyx"], cwd=tree, check=True)
    made = subprocess.run([CROSS, "-std=gnu11", "-O2", "-w", "-march=armv8-a", "-mno-outline-atomics", "-S", "-o", "-",
                           "-I", sysconfig.get_path("include"), "-I", tree / "src/muenfast", code], check=True,
                          capture_output=True, text=True).stdout
    return Counter(" ".join(words.split()) for words in BARRIER.findall(made))


@lru_cache
def barriers_as_is(file: str) -> Counter[str]:
    return barriers(PLACE / "as-is", file)


def arm64(tree: Path, mutation: Mutation) -> tuple[bool, str]:
    """Whether the compiler for arm64 makes something of what was removed."""
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(PLACE / "as-is", tree)
    file = apply(tree, mutation)
    lost = barriers_as_is(file) - barriers(tree, file)
    return bool(lost), ", ".join(f"{count} {name}" for name, count in sorted(lost.items())) or "NOTHING"


def judge(tree: Path, mutation: Mutation, everything: bool) -> tuple[bool, str]:
    """Whether it was noticed, and by whom."""
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(PLACE / "as-is", tree)      # with its times: only what is changed now is built again
    apply(tree, mutation)
    caught = []
    if tests := EVERYTHING if everything else mutation.tests:
        if error := build(tree):
            return False, f"does not build: {error[-300:]}"
        if by := noticed(tree, tests):
            caught.append(by)
    hidden = not caught
    if (hidden or everything) and (mutation.model or mutation.spare):
        if by := noticed(tree, scenarios(mutation.model) if mutation.model else (MODEL,)):
            caught.append(("hidden, memory model: " if hidden else "memory model: ") + by.split("[")[-1].rstrip("]"))
    if not caught and mutation.spare:
        return True, "spare: " + mutation.spare
    return bool(caught), ", ".join(caught) or "SURVIVED"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--everything", action="store_true")
    parser.add_argument("--arm64", action="store_true")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if not arguments.names or any(name in m.name for name in arguments.names)]
    if not chosen:
        sys.exit("no mutation has such a name")
    if arguments.list:
        for m in chosen:
            print(f"{m.name:36} {m.function:18} {' '.join(m.tests)} {' '.join(m.model)}".rstrip())
        return 0
    began = time.monotonic()
    shutil.rmtree(PLACE, ignore_errors=True)
    workers = max(1, min(os.cpu_count() or 1, 4, len(chosen)))
    trees: Queue[Path] = Queue()
    first = copy("as-is")
    for m in chosen:        # the table is right, or nothing is run
        kept = {path: path.read_bytes() for path in sources(first)}
        apply(first, m)
        for path, content in kept.items():
            path.write_bytes(content)
    needed = sorted({test for m in chosen for test in m.tests} | set(EVERYTHING if arguments.everything else ()))
    if arguments.arm64:
        if shutil.which(CROSS) is None:
            sys.exit(f"there is no {CROSS}; on Debian: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross")
    else:
        print("as it is: building and testing", flush=True)
        if error := build(first) if needed else "":
            sys.exit(error)
        if by := noticed(first, (*needed, MODEL), 600):
            sys.exit(f"the tree as it is fails: {by}")
    for number in range(workers):
        trees.put(PLACE / str(number))
    bad, lock = 0, threading.Lock()
    if arguments.arm64:
        chosen = [m for m in chosen if m.orders]

    def one(m: Mutation) -> None:
        nonlocal bad
        tree = trees.get()
        try:
            good, said = arm64(tree, m) if arguments.arm64 else judge(tree, m, arguments.everything)
        finally:
            trees.put(tree)
        with lock:
            bad += not good
            print(f"{m.name:36} | {said}", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, chosen))
    print(f"{len(chosen)} mutations, {bad} not noticed, {time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
