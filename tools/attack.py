"""usage: tools/attack.py [TARGET...] [--seconds N] [--keep] [--record] [--seed N]
       tools/attack.py --plants [NAME...]
       tools/attack.py --list | --write

Fuzzes every parser of foreign bytes: each target of tests/fuzz for N seconds (60), by libFuzzer with AddressSanitizer and
UndefinedBehaviorSanitizer (clang; $CLANG names it), from the corpus that is kept in tests/fuzz/corpus and from what earlier
runs left in build/attack. Without clang: mutations of the corpus, without coverage. Exit status 1 where there is a finding:
its input is in build/attack/findings. --keep: puts what reaches something new into the kept corpus, minimised. --record: adds
the executions to tests/fuzz/executions.json.

--plants: takes one check at a time out of a copy of the sources (PLANTS) and tells which target notices, by its kept corpus
and mutations of it alone; exit status 1 where none does. --write: the tables of docs/attack.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import fuzzing  # noqa: E402
import mutants  # noqa: E402
from fuzzing import TARGETS, Builder  # noqa: E402

PLACE = ROOT / "build/attack"
RECORD = fuzzing.FUZZ / "executions.json"
DOCUMENT = ROOT / "docs/attack.md"
# An unresolved symbol (what needs Python) is no address of a position-independent program.
FLAGS = ("-O1", "-g", "-fno-pie", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fsanitize=fuzzer-no-link",
         "-fno-sanitize-recover=undefined")
LINK = ("-no-pie", "-fsanitize=fuzzer")
MOST_INPUT = 384        # bytes; a target takes more, but finds nothing more there
MOST_KEPT = 1 << 16     # bytes of a kept corpus
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
    Plant("buffer: the device's number", "buffer", "check_request", "if h.device >= s.ndevices:", "if h.device > s.ndevices:"),
    Plant("buffer: the device's end", "buffer", "check_request",
          "if h.device_offset > d.size or h.length > d.size - h.device_offset:",
          "if h.device_offset + h.length > d.size:"),
    Plant("buffer: the buffer's end", "buffer", "check_request", "or h.length > s.length - h.buffer_offset:",
          "or h.length > s.length:"),
    Plant("buffer: alignment", "buffer", "check_request", " or (h.length | h.device_offset) & (d.block_size - 1) != 0", ""),
    Plant("buffer: a run in the buffer", "buffer", "buffer_joined",
          "if h.kind != REQUEST_DISCARD and next.buffer_offset != h.buffer_offset + length[0]:", "if False:"),
    Plant("buffer: a run is checked", "buffer", "buffer_joined", "check_request(s, next) != 0 or ", ""),
    Plant("buffer: headers intact", "buffer", "buffer_batch", "if not reader_intact(&s.r):", "if False:"),
    Plant("buffer: an answer's tag", "buffer", "buffer_batch", "s.answers[waiting].tag = s.heads[k].tag",
          "s.answers[waiting].tag = h.tag"),
    Plant("request: block", "blk", "check_event", "if h.id >= s.store.nblocks:", "if h.id > s.store.nblocks:"),
    Plant("request: read-only", "blk", "check_event", "if h.kind == EVENT_WRITE and s.store.read_only:", "if False:"),
    Plant("request: no old bytes in an answer", "blk", "server_batch",
          "            memset(writer_slot(&s.w, k) + sizeof(block_event_header), 0, BLOCK_SIZE)\n", "            pass\n"),
    Plant("request: file writes intact", "blk", "server_launch", "if not server_intact(s, 0):", "if False:"),
    Plant("frame: the packet's own length", "frame", "frame_take", "if (n < 0 || (uint32_t)n > size - sizeof(h))",
          "if (n < 0)"),
    Plant("frame: a header shorter than its packet", "frame", "ip_length",
          "header < IPV4_HEADER || total < header ? FRAME_LENGTH : (int32_t)total", "(int32_t)total"),
    Plant("frame: nothing of an earlier one", "frame", "frame_finish", "if (used > n)", "if (false)"),
    Plant("segment: TCP's header", "segment", "segment_begin", "if (s->header < upper + minimum || s->header > SEGMENT_HEADER)",
          "if (s->header < upper + minimum)"),
    Plant("segment: the last one's length", "segment", "segment_next", "n = n < s->size ? n : s->size;", "n = s->size;"),
    Plant("segment: the checksum's place", "segment", "segment_begin_whole", " || check + 2 > s->length", ""),
    Plant("coalesce: a checksum is verified", "coalesce", "coalesce_place", "p->good = sum_fold(sum) == 0xffff;",
          "p->good = true;"),
    Plant("coalesce: IPv4's checksum", "coalesce", "coalesce_parse",
          "p->fit = p->named && sum_fold(sum_header(h, IP4_SIZE)) == 0xffff;", "p->fit = p->named;"),
    Plant("coalesce: no more than 65535 bytes", "coalesce", "coalesce_continues",
          " || f->length + p->payload > INET_MOST", ""),
    Plant("coalesce: the sequence number", "coalesce", "coalesce_continues",
          "net32(ub + TCP_SEQUENCE) == net32(ua + TCP_SEQUENCE) + done &&", ""),
]


def clang() -> str | None:
    """A clang that has libFuzzer."""
    names = [os.environ["CLANG"]] if "CLANG" in os.environ else ["clang", *(f"clang-{n}" for n in range(21, 10, -1))]
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        found = subprocess.run([path, "-fsanitize=fuzzer", "-x", "c", "-", "-o", os.devnull], capture_output=True, check=False,
                               input=b"int LLVMFuzzerTestOneInput(const char *d, unsigned long n) { return 0; }")
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


def explore(name: str, seconds: int, seed: int, command: str) -> tuple[int, float, str]:
    """Executions, CPU seconds, and what was found."""
    folder, findings = PLACE / "corpus" / name, PLACE / "findings"
    findings.mkdir(parents=True, exist_ok=True)
    spread(name, folder)
    program = Builder(place("fuzz"), command=[command], flags=FLAGS, link=LINK, replay=False).program(name)
    return fuzz([str(program)], name, seconds, seed, folder, findings)


def fuzz(words: list[str], name: str, seconds: int, seed: int, folder: Path, findings: Path) -> tuple[int, float, str]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*words, f"-max_total_time={seconds}", f"-max_len={MOST_INPUT}", f"-seed={seed}",
                           "-print_final_stats=1", "-timeout=20", "-rss_limit_mb=3000", f"-artifact_prefix={findings}/{name}-",
                           str(folder)], cwd=ROOT, capture_output=True, text=True, errors="replace", check=False,
                          env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    count = re.search(r"stat::number_of_executed_units: *(\d+)", done.stderr)
    said = "" if done.returncode == 0 else "\n".join(done.stderr.splitlines()[-60:])
    return (int(count[1]) if count else 0, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, said)


def place(name: str) -> Path:
    """A folder, empty where a source is newer than what was built there."""
    folder, sources = PLACE / name, [*(ROOT / "src").rglob("*.pyx"), *(ROOT / "src").rglob("*.pxd"), *(ROOT / "src").rglob("*.h"),
                                     *fuzzing.FUZZ.glob("*.[ch]"), ROOT / "tests/fuzzing.py"]
    newest = max(path.stat().st_mtime for path in sources)
    if folder.is_dir() and any(path.stat().st_mtime < newest for path in folder.iterdir()):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def mutate(name: str, seconds: int, seed: int) -> tuple[int, float, str]:
    """As explore(), without clang."""
    before = time.process_time()
    program = Builder(place("replay")).program(name)
    done = fuzzing.replay(program, name, "-n", str(1 << 40), "-t", str(seconds), "-s", str(seed))
    count = re.search(r"^(\d+) executions", done.stdout, re.MULTILINE)
    return int(count[1]) if count else 0, time.process_time() - before, done.stderr if done.returncode else ""


def minimise(name: str) -> int:
    """Keeps of all inputs those that reach something that no smaller one does; how many."""
    folder, few = PLACE / "corpus" / name, PLACE / "few" / name
    shutil.rmtree(few, ignore_errors=True)
    few.mkdir(parents=True)
    subprocess.run([PLACE / "fuzz" / f"fuzz-{name}", "-merge=1", f"-max_len={MOST_INPUT}", few, folder], cwd=ROOT, check=True,
                   capture_output=True, env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"})
    inputs, size = [], 0
    for data in sorted((path.read_bytes() for path in few.iterdir()), key=lambda data: (len(data), data)):
        size += 2 + len(data)
        if size > MOST_KEPT:
            break
        inputs.append(data)
    fuzzing.CORPORA.mkdir(exist_ok=True)
    fuzzing.corpus(name).write_bytes(fuzzing.pack(inputs))
    return len(inputs)


def record(name: str, executions: int, seconds: float, found: bool) -> None:
    books = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    entry = books.setdefault(name, {"executions": 0, "cpu_seconds": 0, "findings": 0})
    entry["executions"] += executions
    entry["cpu_seconds"] += round(seconds)
    entry["findings"] += found
    RECORD.write_text(json.dumps(dict(sorted(books.items())), indent=1) + "\n")


def attack(names: list[str], arguments: argparse.Namespace) -> int:
    command, bad, total = clang(), 0, 0
    if command is None:
        print("there is no clang with libFuzzer (Debian: clang): mutations of the kept corpora, without coverage", flush=True)
    for name in names:
        if command is None:
            executions, seconds, said = mutate(name, arguments.seconds, arguments.seed or 1)
        else:
            executions, seconds, said = explore(name, arguments.seconds, arguments.seed, command)
        bad += bool(said)
        total += executions
        print(f"{name:12} {executions:12} executions in {seconds:6.1f} s of CPU time" + (f"\n{said}" if said else ""), flush=True)
        if arguments.record:
            record(name, executions, seconds, bool(said))
        if arguments.keep and command is not None and not said:
            print(f"{name:12} {minimise(name)} inputs are kept", flush=True)
    print(f"{len(names)} targets, {total} executions, {bad} findings")
    return 1 if bad else 0


def noticed(plant: Plant) -> str:
    """Who notices a planted bug, and how; "" where nobody does."""
    tree = PLACE / "plant"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.c", "*.so", "*.egg-info", "__pycache__"))
    mutants.apply(tree, plant.mutation)
    folder = tree / "fuzz"
    folder.mkdir()
    program = Builder(folder, tree / "src/muenfast").program(plant.target)
    began = time.monotonic()
    done = fuzzing.replay(program, plant.target, "-n", PLANT_EXECUTIONS, "-t", PLANT_SECONDS, "-s", "1")
    if done.returncode == 0:
        return ""
    said = re.search(r"^oracle: .*|^signal \d+", done.stderr, re.MULTILINE)
    return f"{plant.target} after {time.monotonic() - began:.1f} s: {said[0] if said else done.stderr[-200:]}"


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
    rows = ["| target | whose bytes | million executions | CPU minutes | findings |", "|---|---|--:|--:|--:|"]
    for name, target in TARGETS.items():
        entry = books.get(name, {"executions": 0, "cpu_seconds": 0, "findings": 0})
        rows.append(f"| {name} | {target.parses} | {entry['executions'] / 1e6:.1f} | {entry['cpu_seconds'] / 60:.1f} "
                    f"| {entry['findings']} |")
    rows.append(f"| all | | {sum(entry['executions'] for entry in books.values()) / 1e6:.1f} "
                f"| {sum(entry['cpu_seconds'] for entry in books.values()) / 60:.1f} "
                f"| {sum(entry['findings'] for entry in books.values())} |")
    bugs = ["| a check that is removed | in | noticed by |", "|---|---|---|"]
    bugs += [f"| {plant.name} | `{plant.function}` | {plant.target} |" for plant in PLANTS]
    for mark, table in (("tools/attack.py --write", rows), ("plants", bugs)):
        begin = text.index(f"<!-- {mark} -->\n") + len(f"<!-- {mark} -->\n")
        text = text[:begin] + "\n".join(table) + "\n" + text[text.index("<!-- end -->", begin):]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
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
