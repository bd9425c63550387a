"""usage: tools/foreign.py [--write]

Counts the lines of code that touch bytes which somebody else wrote: functions of the cores, and whole files. Printed as the
table of docs/security.md; --write puts it there. A function or file that is named here and is not there is an error.

Counted are lines with code: no blank ones, comments and docstrings. What the kernel says (FUSE's and TUN's headers) and
what the operator does (command lines, policies) is not foreign; what packets hold is.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src/muenfast"
DOCUMENT = ROOT / "docs/security.md"
BEGIN, END = "<!-- tools/foreign.py --write -->\n", "<!-- end -->\n"

# (who may have written it, file, its functions; none: all of the file)
TABLE: list[tuple[str, str, str]] = [
    ("channels: header, counters, elements", "_ring.pyx",
     "reader_sync went_back reader_settled reader_overrun reader_forgive reader_goto reader_peek reader_slot reader_intact "
     "reader_recover reader_advance reader_copy reader_drain reader_ready"),
    ("bells", "_ring.pyx", "ring bell_kick watched_sleep reader_wait any_ready readers_wait"),
    ("a region that goes away", "_guard.h", ""),
    ("a client's requests, inline", "_blk.pyx",
     "check_event server_offered server_verify server_judge server_check server_intact server_life server_move event_flow "
     "server_refused server_run_blocks server_answer server_took server_forgotten server_batch server_finish server_launch "
     "server_take server_step"),
    ("a client's requests over a buffer, and the buffer", "_buffer.pyx",
     "moves repeatable buffer_taken buffer_right buffer_judge buffer_over buffer_give buffer_summed check_request "
     "buffer_move checked_flow buffer_flow buffer_refused buffer_run buffer_smart buffer_query buffer_answer "
     "buffer_answers buffer_sync buffer_batch buffer_finish buffer_launch buffer_take buffer_step"),
    ("a server's answers, inline", "_client.pyx",
     "client_reap client_sum client_stray client_again client_settle client_introduced client_take_size client_connect "
     "client_answered client_rings"),
    ("block messages with checksums", "_blocksum.h", ""),
    ("a server's answers over a buffer", "_bufclient.pyx",
     "shared_reap shared_sum shared_heard can_be probe_word shared_untouched shared_took shared_listen shared_connect"),
    ("elements of network channels", "_frame.h", "ip_length frame_header frame_agrees frame_take frame_right"),
    ("elements of network channels", "_net.pyx",
     "sender_room sender_untaken sender_asked sender_agree receiver_malformed receiver_take receiver_batch receiver_place "
     "receiver_merge receiver_loop"),
    ("packets, merged", "_coalesce.h", ""),
    ("packets, split", "_segment.h", ""),
    ("packets, too long for their path", "_pmtu.h", ""),
    ("packets: numbers and checksums", "_inet.h", ""),
    ("packets: numbers and checksums", "_checksum.h", ""),
    ("NBD clients", "attach/_nbd.pyx",
     "take_request refuse accept_request advance_payload end_reception consume receive feed serve receive_all"),
    ("NBD clients: negotiation", "attach/nbd.py", ""),
    ("whoever asks a control socket", "control.py", "take _is_text _answer _read _execute _line"),
    ("a serving process that was taken over: its broker", "broker/__init__.py", ""),
    ("whoever wrote the disk: partition tables", "partition.py", ""),
]


def _without_comments(source: str) -> str:
    """C, with the lines that it has."""
    return re.sub(r"/\*.*?\*/|//[^\n]*", lambda match: "\n" * match[0].count("\n"), source, flags=re.DOTALL)


def _python_lines(source: str) -> set[int]:
    """Numbers of the lines that have code, of Python or Cython."""
    lines: set[int] = set()
    statement = True    # whether a string here would be one
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
                          tokenize.ENDMARKER):
            statement = statement or token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            continue
        if token.type == tokenize.STRING and statement and token.string.startswith('"""'):
            statement = False
            continue
        statement = False
        lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def _span(lines: list[str], name: str) -> tuple[int, int]:
    """First and last line (from 1) of a function, by its indentation. Raises LookupError."""
    pattern = re.compile(rf"^(\s*)(?:cdef|cpdef|def|static inline|FRAME_APART)\b[^\n=]*?\b{re.escape(name)}\(")
    starts = [i for i, line in enumerate(lines) if pattern.match(line)]
    if len(starts) != 1:
        raise LookupError(f"{name}: {len(starts)} functions of that name")
    match = pattern.match(lines[starts[0]])
    assert match is not None
    indent, end = len(match[1]), starts[0] + 1
    while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent
                                or lines[end].strip() == "}"):
        end += 1
        if lines[end - 1].strip() == "}" and len(lines[end - 1]) - len(lines[end - 1].lstrip()) == indent:
            break
    return starts[0] + 1, end


def count(file: str, names: str) -> int:
    """Lines of code in functions of a file, or in all of it. Raises LookupError, OSError."""
    source = (SOURCES / file).read_text()
    if file.endswith(".h"):
        source = _without_comments(source)
        coded = {i for i, line in enumerate(source.split("\n"), 1) if line.strip()}
    else:
        coded = _python_lines(source)
    if not names:
        return len(coded)
    lines = source.split("\n")
    spans = [_span(lines, name) for name in names.split()]
    return len({line for first, last in spans for line in coded if first <= line <= last})


def table() -> str:
    """Markdown."""
    rows = [(who, file, "all" if not names else f"{len(names.split())} functions", count(file, names))
            for who, file, names in TABLE]
    text = "| whose bytes | file | of it | lines |\n|---|---|---|--:|\n"
    text += "".join(f"| {who} | `{file}` | {part} | {lines} |\n" for who, file, part, lines in rows)
    return text + f"| all | | | {sum(row[3] for row in rows)} |\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/security.md")
    if parser.parse_args().write:
        text = DOCUMENT.read_text()
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            print(f"{DOCUMENT}: has no place for the table", file=sys.stderr)
            return 1
        DOCUMENT.write_text(before + begin + table() + end + after)
    print(table(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
