"""usage: tools/attack.py [TARGET...] [--seconds N] [--fast] [--keep] [--record] [--seed N]
       tools/attack.py --plants [NAME...]
       tools/attack.py --list | --write

Fuzzes every parser of foreign bytes: each target of tests/fuzz for N seconds (60), by libFuzzer with AddressSanitizer and
UndefinedBehaviorSanitizer (clang; $CLANG names it), from the corpus that is kept in tests/fuzz/corpus and from what earlier
runs left in build/attack; targets in Python by Atheris (pip install atheris). Without clang: mutations of the corpus,
without coverage. --fast: targets of C without sanitizers, for three to ten times as many executions in that time: what is
noticed is what guard pages and oracles see. Exit status 1 where there is a finding:
its input is in build/attack/findings. --keep: puts what reaches something new into the kept corpus, minimised. --record:
adds the executions to tests/fuzz/executions.json.

--plants: takes one check at a time out of a copy of the sources (PLANTS) and tells which target notices, by its kept corpus
and mutations of it alone; exit status 1 where none does. --write: the tables of docs/attack.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import fuzzing  # noqa: E402
import mutants  # noqa: E402
from fuzzing import TARGETS, Builder  # noqa: E402

PLACE = ROOT / "build/attack"
RECORD = fuzzing.FUZZ / "executions.json"
DOCUMENT = ROOT / "docs/attack.md"
# An unresolved symbol (what needs Python) is no address of a position-independent program.
FLAGS = (
    "-O2",
    "-gline-tables-only",
    "-fno-pie",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fsanitize=fuzzer-no-link",
    "-fno-sanitize-recover=undefined",
)
# Coverage alone: what comparisons compare (trace-cmp) and what sanitizers look at take most of the time.
FAST = ("-O2", "-gline-tables-only", "-fno-pie", "-fsanitize-coverage=inline-8bit-counters,pc-table")
LINK = ("-no-pie", "-fsanitize=fuzzer")
MOST_INPUT = 384  # bytes; a target takes more, but finds nothing more there
MOST_KEPT = 1 << 16  # bytes of a kept corpus
PLANT_EXECUTIONS = "2000000"
PLANT_SECONDS = "60"


@dataclass(frozen=True, slots=True)
class Plant:
    """A bug: `old` in that function becomes `new`. target: which notices."""

    name: str
    target: str
    function: str
    old: str
    new: str
    count: int = 1
    file: str = ""  # in Python; else where the function is

    def plant(self, tree: Path) -> None:
        """Puts it into a copy of the sources. Ends the program where the text does not stand there just once."""
        if not self.file:
            mutants.apply(tree, self.mutation)
            return
        path = tree / "src/muenfast" / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            sys.exit(f"{self.name}: {self.file} has that text {text.count(self.old)} times:\n{self.old}")
        path.write_text(text.replace(self.old, self.new))

    @property
    def mutation(self) -> mutants.Mutation:
        return mutants.Mutation(self.name, self.function, self.old, self.new, (), count=self.count)


PLANTS: list[Plant] = [
    Plant("header: elements fit", "ring", "acceptable", "and elements <= r.capacity // size)", ")"),
    Plant("header: loaded twice", "ring", "reader_sync", "        r.elements = elements\n",
          "        r.elements = load_relaxed64(&r.hdr.elements)\n"),
    Plant("WSC after the copy", "ring", "reader_copy", "if not reader_intact(r):", "if False:"),
    Plant("a restart under the same epoch", "ring", "reader_intact", "r.wc - r.rc <= ahead <=", "ahead <="),
    Plant("lost elements are counted", "ring", "reader_overrun", "r.lost = wc - r.rc", "r.lost = r.elements"),
    Plant("buffer: the device's number", "buffer", "check_request", "if h.device >= s.ndevices:",
          "if h.device > s.ndevices:"),
    Plant("buffer: the device's end", "buffer", "check_request",
          "if h.device_offset > d.size or h.length > d.size - h.device_offset:", "if h.device_offset + h.length > d.size:"),
    Plant("buffer: the buffer's end", "buffer", "check_request", "or h.length > s.length - h.buffer_offset:",
          "or h.length > s.length:"),
    Plant(
        "buffer: alignment", "buffer", "check_request", " or (h.length | h.device_offset) & (d.block_size - 1) != 0", ""
    ),
    Plant("buffer: a run in the buffer", "buffer", "buffer_joined",
          "if h.kind != REQUEST_DISCARD and next.buffer_offset != h.buffer_offset + length[0]:", "if False:"),
    Plant("buffer: a run is checked", "buffer", "buffer_joined", "check_request(s, next) != 0 or ", ""),
    Plant("buffer: headers intact", "buffer", "buffer_batch", "if not reader_intact(&s.r):", "if False:"),
    Plant("buffer: an answer's tag", "buffer", "buffer_batch", "s.answers[waiting].tag = s.heads[k].tag",
          "s.answers[waiting].tag = h.tag"),
    Plant("bell: a look behind the announcement", "bell", "reader_wait",
          "            if reader_ready(r):\n                break\n            futex_wait_ns",
          "            futex_wait_ns"),
    Plant("bell: the announcement", "bell", "reader_wait", "            store_relaxed32(&r.bell.waiters, 1)\n", ""),
    Plant("bell: a sleep has an end", "bell", "reader_wait", "limit = SLEEP_NS", "limit = ns"),
    Plant("bell: announcements are taken back", "bell", "bell_kick", "    exchange_acqrel32(&bell.waiters, 0)\n", ""),
    Plant("bell: all of them are slept on", "bell", "readers_wait",
          "                heard[asleep] = r\n                asleep += 1\n",
          "                heard[asleep] = r\n                asleep = 1\n"),
    Plant("bell: rings in vain have a limit", "bell", "reader_deaf",
          "return r.vain >= VAIN_MOST + (r.batches - r.vain_from)", "return False"),
    Plant("request: block", "blk", "check_event", "if h.id >= s.store.nblocks:", "if h.id > s.store.nblocks:"),
    Plant("request: read-only", "blk", "check_event", "if h.kind == EVENT_WRITE and s.store.read_only:", "if False:"),
    Plant("request: no old bytes in an answer", "blk", "server_batch",
          "            memset(writer_slot(&s.w, k) + sizeof(block_event_header), 0, BLOCK_SIZE)\n", "            pass\n"),
    Plant("request: file writes intact", "blk", "server_launch", "if not server_intact(s, 0):", "if False:"),
    Plant("answer: in flight", "client", "client_reap", "load_acquire32(&e.state) == ENTRY_ISSUED and ", ""),
    Plant("answer: block", "client", "client_reap", " and e.id == h.id", ""),
    Plant("answer: intact", "client", "client_reap", "if not reader_intact(&c.r):", "if False:"),
    Plant("answer: an errno", "client", "client_settle", "errors[k] if -LINUX_ERRNO_MAX <= errors[k] <= 0 else -EIO",
          "errors[k]"),
    Plant("answer: the device", "bufclient", "shared_reap", " and e.device == a.device", ""),
    Plant("answer: a place is free again", "bufclient", "shared_free",
          "            shared_mark(b, e.place // b.unit, length // b.unit, False)\n", "            pass\n"),
    Plant("place: alignment", "bufclient", "shared_find", "first = (at - run + align - 1) & ~(align - 1)",
          "first = at - run"),
    Plant("NBD: the disk's end", "nbd", "refuse", "if q.offset > size or q.length > size - q.offset:",
          "if q.offset + q.length > size:"),
    Plant("NBD: the longest request", "nbd", "refuse",
          "(q.type == CMD_READ or q.type == CMD_WRITE) and q.length > MAX_LENGTH", "False"),
    Plant("NBD: read-only", "nbd", "refuse", "if q.type != CMD_READ and d.read_only:", "if False:"),
    Plant("NBD: an edge's other bytes", "nbd", "overlay", "        memcpy(new, old, start)\n", "        pass\n"),
    Plant("NBD: pieces come back", "nbd", "release", "        put_back(c, r.edge)\n", "        pass\n"),
    Plant("frame: the packet's own length", "frame", "frame_take", "if (n < 0 || (uint32_t)n > size - sizeof(h))",
          "if (n < 0)"),
    Plant("frame: a header shorter than its packet", "frame", "ip_length",
          "header < IPV4_HEADER || total < header ? FRAME_LENGTH : (int32_t)total", "(int32_t)total"),
    Plant("frame: nothing of an earlier one", "frame", "frame_finish", "if (used > n)", "if (false)"),
    Plant("net: an element is left alone", "net", "receiver_batch", "if not reader_intact(&v.r):", "if False:"),
    Plant("net: what is wrong is dropped", "net", "receiver_batch", "if v.lengths[k] < 0:",
          "if v.lengths[k] == FRAME_PROTOCOL:"),
    Plant("net: an element's checksum", "net", "receiver_take",
          "not frame_right(v.kind, to, slot, v.size, <uint32_t>n, v.r.rc + k, v.r.epoch)", "False"),
    Plant("net: what is merged is what was verified", "net", "receiver_place", "        slot = v.stage + HEADROOM\n", ""),
    Plant("net: merged with its like only", "net", "receiver_place",
          "<uint64_t>marks_child(v.marks, h.mark) << 32 | h.mark)",
          "<uint64_t>marks_child(v.marks, h.mark) << 32)"),
    Plant("net: a mark goes with its packet", "net", "receiver_write", "if mark != 0 and p.way == PORT_FRONT:",
          "if False:"),
    Plant("path: a mark beyond the region", "paths", "sender_limit", "if s.mark == 0 or s.mark > s.marks:",
          "if s.mark == 0:"),
    Plant("path: the least that a limit is", "paths", "pmtu_of", "return entry == 0 || entry >= least ? entry : least;",
          "return entry;"),
    Plant("path: what is longer", "paths", "sender_whole", "limit < n <= room", "limit + 8 < n <= room"),
    Plant("path: a reader that stands still", "paths", "sender_room", "elif now - s.full_since >= STUCK_NS:",
          "elif False:"),
    Plant("segment: TCP's header", "segment", "segment_begin",
          "if (s->header < upper + minimum || s->header > SEGMENT_HEADER)", "if (s->header < upper + minimum)"),
    Plant(
        "segment: the last one's length", "segment", "segment_next", "n = n < s->size ? n : s->size;", "n = s->size;"
    ),
    Plant("segment: the checksum's place", "segment", "segment_begin_whole", " || check + 2 > s->length", ""),
    Plant("coalesce: a checksum is verified", "coalesce", "coalesce_place", "p->good = sum_fold(sum) == 0xffff;",
          "p->good = true;"),
    Plant("coalesce: IPv4's checksum", "coalesce", "coalesce_parse",
          "p->fit = p->named && sum_fold(sum_header(h, IP4_SIZE)) == 0xffff;", "p->fit = p->named;"),
    Plant("coalesce: no more than 65535 bytes", "coalesce", "coalesce_continues", " || f->length + p->payload > INET_MOST",
          ""),
    Plant("coalesce: the sequence number", "coalesce", "coalesce_continues",
          "net32(ub + TCP_SEQUENCE) == net32(ua + TCP_SEQUENCE) + done &&", ""),
]

PLANTS += [
    Plant("partition: beyond the disk", "partitions", "add", "begin >= size or end - size >= _TAIL", "begin >= size",
          file="partition.py"),
    Plant("partition: a GPT's entries leave the disk", "partitions", "_gpt_header",
          "if entries < 2 or entries * unit + count * bytes_each > size:", "if entries < 2:", file="partition.py"),
    Plant("policy: both ends one subject", "policies", "_regions", "region.writers == region.readers", "False",
          file="policy.py"),
    Plant("control: a field's kind", "control", "take", "if not good(value):", "if False:", file="control.py"),
    Plant("control: a flag is no number", "control", "KINDS", "type(value) is int and 0 <=",
          "isinstance(value, int) and 0 <=", file="control.py"),
    Plant("broker: a field's kind", "broker", "take", "if not self.fields[name].good(value):", "if False:",
          file="broker/__init__.py"),
    Plant("broker: a text as a whole", "broker", "word", "re.fullmatch(", "re.match(", file="broker/__init__.py"),
    Plant("broker: who claimed a name", "broker", "_of", 'raise Refused(f"{name} was not claimed here")',
          "found = next(iter(self._disks.values()), None)", file="broker/disks.py"),
    Plant("broker: one mount", "broker", "_mount", "            if disk.mounted:\n", "            if False:\n",
          file="broker/disks.py"),
    Plant("broker: who does not answer can be ended", "broker", "_loop", "            if disk.abort < 0:\n",
          "            if False:\n", file="broker/disks.py"),
    Plant("broker: a partition that was made", "broker", "_remove_part", "if device is None or disk.parts is None:",
          "if disk.parts is None:", file="broker/disks.py"),
    Plant("broker: one device of a name", "broker", "_make",
          "if any(held.declared == name for held in self._held.values()):", "if False:", file="broker/net.py"),
    Plant("broker: a child's parent is there", "broker", "_where",
          'raise Refused(f"{name} is a child of {parent}, which is not there")', "yield self._configs[parent], None",
          file="broker/net.py"),
    Plant("path MTUs: a word that is none", "pathmtus", "_check", "if largest > MOST:", "if False:", file="pathmtu.py"),
    Plant("path MTUs: a mark of the region", "pathmtus", "put", "if not 1 <= mark <= len(words):",
          "if not mark <= len(words):", file="pathmtu.py"),
    Plant("negotiation: the export's name", "negotiation", "_is_ours", 'name in (b"", self._name)', "True",
          file="attach/nbd.py"),
    Plant("negotiation: the option's lengths", "negotiation", "_inform", "good = len(data) == 6 + length + 2 * count",
          "good = True", file="attach/nbd.py"),
]


def clang() -> str | None:
    """A clang that has libFuzzer."""
    names = [os.environ["CLANG"]] if "CLANG" in os.environ else ["clang", *(f"clang-{n}" for n in range(21, 10, -1))]
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        found = subprocess.run(
            [path, "-fsanitize=fuzzer", "-x", "c", "-", "-o", os.devnull],
            capture_output=True,
            check=False,
            input=b"int LLVMFuzzerTestOneInput(const char *d, unsigned long n) { return 0; }",
        )
        if found.returncode == 0:
            return path
    return None


def kept(name: str) -> list[bytes]:
    path = fuzzing.corpus(name)
    return fuzzing.unpack(path.read_bytes()) if path.exists() else []


def spread(name: str, folder: Path) -> None:
    """A kept corpus, a file for each input."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(kept(name)):
        (folder / f"kept-{number:04}").write_bytes(data)


def explore(name: str, seconds: int, seed: int, command: str, fast: bool) -> tuple[int, float, str]:
    """Executions, CPU seconds, and what was found."""
    folder, findings = PLACE / "corpus" / name, PLACE / "findings"
    findings.mkdir(parents=True, exist_ok=True)
    spread(name, folder)
    if TARGETS[name].python:
        return fuzz([sys.executable, str(fuzzing.FUZZ / "parsers.py"), name], name, seconds, seed, folder, findings)
    program = built(name, command, fast)
    return fuzz([str(program)], name, seconds, seed, folder, findings)


def built(name: str, command: str, fast: bool = False) -> Path:
    """A target of C, with libFuzzer."""
    folder, flags = (place("fast"), FAST) if fast else (place("fuzz"), FLAGS)
    return Builder(folder, command=[command], flags=flags, link=LINK, replay=False).program(name)


def fuzz(words: list[str], name: str, seconds: int, seed: int, folder: Path, findings: Path) -> tuple[int, float, str]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [
            *words,
            f"-max_total_time={seconds}",
            f"-max_len={MOST_INPUT}",
            f"-seed={seed}",
            "-print_final_stats=1",
            "-timeout=20",
            "-rss_limit_mb=3000",
            f"-artifact_prefix={findings}/{name}-",
            str(folder),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    count = re.search(r"stat::number_of_executed_units: *(\d+)", done.stderr)
    said = "" if done.returncode == 0 else "\n".join(done.stderr.splitlines()[-60:])
    return (int(count[1]) if count else 0, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, said)


def place(name: str) -> Path:
    """A folder, empty where a source is newer than what was built there."""
    folder, sources = (
        PLACE / name,
        [
            *(ROOT / "src").rglob("*.pyx"),
            *(ROOT / "src").rglob("*.pxd"),
            *(ROOT / "src").rglob("*.h"),
            *fuzzing.FUZZ.glob("*.[ch]"),
            ROOT / "tests/fuzzing.py",
        ],
    )
    newest = max(path.stat().st_mtime for path in sources)
    if folder.is_dir() and any(path.stat().st_mtime < newest for path in folder.iterdir()):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def mutate(name: str, seconds: int, seed: int) -> tuple[int, float, str]:
    """As explore(), without clang."""
    before = time.process_time()
    if TARGETS[name].python:
        return 0, 0.0, ""  # tests/test_attack.py replays them
    program = Builder(place("replay")).program(name)
    done = fuzzing.replay(program, name, "-n", str(1 << 40), "-t", str(seconds), "-s", str(seed))
    count = re.search(r"^(\d+) executions", done.stdout, re.MULTILINE)
    return int(count[1]) if count else 0, time.process_time() - before, done.stderr if done.returncode else ""


def reach(name: str, folder: Path, few: Path) -> None:
    """Copies the inputs of a target in Python that step from a line to another one as no smaller one does."""
    import parsers  # of tests/fuzz

    seen: set[tuple[str, int, int]] = set()
    fresh: set[tuple[str, int, int]] = set()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        file = frame.f_code.co_filename
        if "muenfast" not in file and "tomllib" not in file:
            return None
        before = frame.f_lineno

        def step(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal before
            fresh.add((file, before, frame.f_lineno))
            before = frame.f_lineno
            return step

        return step

    logging.disable(logging.CRITICAL)
    for path in sorted(folder.iterdir(), key=lambda path: (path.stat().st_size, path.name)):
        data = path.read_bytes()
        fresh.clear()
        sys.settrace(trace)
        try:
            parsers.TARGETS[name](data)
        finally:
            sys.settrace(None)
        if not fresh <= seen:
            seen |= fresh
            (few / path.name).write_bytes(data)


def minimise(name: str, command: str) -> int:
    """Keeps of all inputs those that reach something that no smaller one does; how many."""
    folder, few = PLACE / "corpus" / name, PLACE / "few" / name
    shutil.rmtree(few, ignore_errors=True)
    few.mkdir(parents=True)
    if TARGETS[name].python:
        reach(name, folder, few)
    else:
        subprocess.run(
            [built(name, command), "-merge=1", f"-max_len={MOST_INPUT}", few, folder],
            cwd=ROOT,
            check=True,
            capture_output=True,
            env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"},
        )
    inputs, size = [], 0
    for data in sorted((path.read_bytes() for path in few.iterdir()), key=lambda data: (len(data), data)):
        size += 2 + len(data)
        if size > MOST_KEPT:
            break
        inputs.append(data)
    fuzzing.CORPORA.mkdir(exist_ok=True)
    fuzzing.corpus(name).write_bytes(fuzzing.pack(inputs))
    return len(inputs)


def record(name: str, executions: int, seconds: float, found: bool, fast: bool) -> None:
    """fast: those without sanitizers are told apart from the others, and are part of all."""
    books = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    entry = books.setdefault(name, {"executions": 0, "cpu_seconds": 0, "findings": 0})
    entry["executions"] += executions
    if fast:
        entry["fast"] = entry.get("fast", 0) + executions
    entry["cpu_seconds"] += round(seconds)
    entry["findings"] += found
    RECORD.write_text(json.dumps(dict(sorted(books.items())), indent=1) + "\n")


def attack(names: list[str], arguments: argparse.Namespace) -> int:
    command, bad, total = clang(), 0, 0
    if command is None:
        print(
            "there is no clang with libFuzzer (Debian: clang): mutations of the kept corpora, without coverage",
            flush=True,
        )
    guided = importlib.util.find_spec("atheris") is not None
    if not guided and any(TARGETS[name].python for name in names):
        print("there is no Atheris (pip install atheris): targets in Python get mutations, without coverage", flush=True)
    for name in names:
        if command is None or TARGETS[name].python and not guided:
            executions, seconds, said = mutate(name, arguments.seconds, arguments.seed or 1)
        else:
            executions, seconds, said = explore(name, arguments.seconds, arguments.seed, command, arguments.fast)
        bad += bool(said)
        total += executions
        print(
            f"{name:12} {executions:12} executions in {seconds:6.1f} s of CPU time" + (f"\n{said}" if said else ""),
            flush=True,
        )
        if arguments.record:
            record(name, executions, seconds, bool(said), arguments.fast and not TARGETS[name].python)
        if arguments.keep and command is not None and not said:
            print(f"{name:12} {minimise(name, command)} inputs are kept", flush=True)
    print(f"{len(names)} targets, {total} executions, {bad} findings")
    return 1 if bad else 0


def noticed(plant: Plant) -> str:
    """Who notices a planted bug, and how; "" where nobody does."""
    tree = PLACE / "plant"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(
        ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.c", "*.so", "*.egg-info", "__pycache__")
    )
    plant.plant(tree)
    if plant.file:
        return noticed_in_python(plant, tree)
    folder = tree / "fuzz"
    folder.mkdir()
    program = Builder(folder, tree / "src/muenfast").program(plant.target)
    began = time.monotonic()
    done = fuzzing.replay(program, plant.target, "-n", PLANT_EXECUTIONS, "-t", PLANT_SECONDS, "-s", "1")
    if done.returncode == 0:
        return ""
    said = re.search(r"^oracle: .*|^signal \d+", done.stderr, re.MULTILINE)
    return f"{plant.target} after {time.monotonic() - began:.1f} s: {said[0] if said else done.stderr[-200:]}"


def noticed_in_python(plant: Plant, tree: Path) -> str:
    """The same of a target in Python: the copy has the extensions of the installed package."""
    installed = Path(importlib.util.find_spec("muenfast").origin or "").parent
    for module in installed.rglob("*.so"):
        target = tree / "src/muenfast" / module.relative_to(installed)
        target.symlink_to(module)
    program = (
        "import sys; sys.path[:0] = sys.argv[2:5]; import fuzzing; "
        "sys.exit(fuzzing.replay_python(sys.argv[1], 1000000, 1, float(sys.argv[5])) or 0)"
    )
    began = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            plant.target,
            str(tree / "src"),
            str(ROOT / "tests"),
            str(fuzzing.FUZZ),
            PLANT_SECONDS,
        ],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return ""
    return f"{plant.target} after {time.monotonic() - began:.1f} s: {(done.stderr.splitlines() or ['?'])[-1][:150]}"


def plants(names: list[str]) -> int:
    chosen = [plant for plant in PLANTS if not names or any(name in plant.name for name in names)]
    if not chosen:
        sys.exit("no plant has such a name")
    missed = 0
    for plant in chosen:
        by = noticed(plant)
        missed += not by
        print(f"{plant.name:44} | {by or 'NOT NOTICED'}", flush=True)
    print(f"{len(chosen)} planted bugs, {missed} not noticed")
    return 1 if missed else 0


def documented(text: str) -> str:
    """docs/attack.md with the tables as they are now."""
    books = json.loads(RECORD.read_text())
    rows = [
        "| target | whose bytes | million executions | of these without sanitizers | CPU minutes | findings |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name, target in TARGETS.items():
        entry = books.get(name, {"executions": 0, "cpu_seconds": 0, "findings": 0})
        rows.append(
            f"| {name} | {target.parses} | {entry['executions'] / 1e6:.1f} "
            f"| {entry.get('fast', 0) / 1e6:.1f} | {entry['cpu_seconds'] / 60:.1f} "
            f"| {entry['findings']} |"
        )
    rows.append(
        f"| all | | {sum(entry['executions'] for entry in books.values()) / 1e6:.1f} "
        f"| {sum(entry.get('fast', 0) for entry in books.values()) / 1e6:.1f} "
        f"| {sum(entry['cpu_seconds'] for entry in books.values()) / 60:.1f} "
        f"| {sum(entry['findings'] for entry in books.values())} |"
    )
    bugs = ["| a check that is removed | in | noticed by |", "|---|---|---|"]
    bugs += [f"| {plant.name} | `{plant.function}` | {plant.target} |" for plant in PLANTS]
    for mark, table in (("tools/attack.py --write", rows), ("plants", bugs)):
        begin = text.index(f"<!-- {mark} -->\n") + len(f"<!-- {mark} -->\n")
        text = text[:begin] + "\n".join(table) + "\n" + text[text.index("<!-- end -->", begin) :]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--plants", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        for name, target in TARGETS.items():
            print(f"{name:12} {target.parses}")
        return 0
    if arguments.write:
        DOCUMENT.write_text(documented(DOCUMENT.read_text()))
        return 0
    if arguments.plants:
        return plants(arguments.names)
    unknown = [name for name in arguments.names if name not in TARGETS]
    if unknown:
        sys.exit(f"there is no target {unknown[0]}; there are {', '.join(TARGETS)}")
    return attack(arguments.names or list(TARGETS), arguments)


if __name__ == "__main__":
    sys.exit(main())
