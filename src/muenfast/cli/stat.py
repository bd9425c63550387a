"""muenfast stat: what the serving processes of this user do."""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

from muenfast.cli._serving import Stop
from muenfast.cli._text import user_lines
from muenfast.errors import UsageError

_LEAST, _MOST = 0.01, 86400.0  # seconds of an interval
_LOOK = 0.2  # seconds between looks whether a signal has come
_SHOWN = frozenset(("reads", "writes", "discards", "syncs", "bytes_read", "bytes_written", "bytes_discarded", "merged"))
_TABLE = "{:<8}  {:<9}  {:>11}  {:>9}  {:>8}  {:>6}  {:>9}  {:>9}  {}"
_HEAD = _TABLE.format("TIME", "DIRECTION", "REQUESTS/s", "MB/s", "ERRORS/s", "DEPTH", "p50 us", "p99 us", "DISK")

Key = tuple[Any, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME, --watch, --json."""
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help="only entries of that channel, disk, device node, buffer or process number")
    parser.add_argument("--watch", nargs="?", const="1", metavar="SECONDS",
                        help="numbers per second, again and again, until Ctrl-C (default: every second)")
    parser.add_argument("--json", action="store_true",
                        help="print everything as JSON; with --watch an object per line and interval")


def run(arguments: argparse.Namespace) -> int:
    """Prints one block per export or disk; status 1 when a process does not answer. --watch: 0 after a signal, and once
    nobody reads any more."""
    names = list(arguments.names)
    if arguments.watch is None:
        return _once(names, arguments.json)
    try:
        seconds = float(arguments.watch)
    except ValueError:  # `--watch NAME`
        names.append(arguments.watch)
        seconds = 1.0
    if not _LEAST <= seconds <= _MOST:
        raise UsageError(f"an interval is {_LEAST:g} to {_MOST:g} seconds", option="--watch", value=arguments.watch)
    # A flag, no KeyboardInterrupt: one that is raised in a destructor or a callback is lost.
    with Stop() as stop:
        return _watched(names, seconds, arguments.json, stop)


def _watched(names: list[str], seconds: float, as_json: bool, stop: Stop) -> int:
    try:
        _watch(names, seconds, as_json, stop)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has nowhere to go
    return 0


def _answers(names: list[str]) -> list[dict[str, Any]]:
    """What all processes say, of the named entries only. A process that has none of them is left out."""
    from muenfast.control import ask_all

    answers = ask_all({"command": "status"})
    if not names:
        return answers
    found = []
    for answer in answers:
        entries = [entry for entry in answer.get("entries", ()) if _names(answer, entry).intersection(names)]
        if entries or str(answer["pid"]) in names:
            found.append(answer | ({"entries": entries} if answer["ok"] else {}))
    return found


def _names(answer: dict[str, Any], entry: dict[str, Any]) -> set[str]:
    """Everything that an entry may be called."""
    words = [answer["pid"], entry["req"], entry["resp"], entry.get("shm"), entry.get("device"),
             *(each.get("device") for each in entry.get("devices", ()))]
    if isinstance(entry.get("nbd"), dict):
        words.append(entry["nbd"]["socket"])
    return {str(word) for word in words if word is not None} - {"-"}


def _known(names: list[str]) -> list[dict[str, Any]]:
    """_answers(). Raises UsageError where there is no entry of one of the names."""
    answers = _answers(names)
    known = {word for answer in answers for entry in answer.get("entries", ()) for word in _names(answer, entry)}
    for index, name in enumerate(names):
        if name not in known.union(str(answer["pid"]) for answer in answers):
            raise UsageError("nothing that this user serves or uses is called that", option="NAME", index=index, value=name,
                             hint="`muenfast stat` shows what there is")
    return answers


def _once(names: list[str], as_json: bool) -> int:
    answers = _known(names)
    if as_json:
        print(json.dumps(answers, indent=2))
    elif not answers:
        print("nothing of this user is serving")
    else:
        for answer in answers:
            print(f"process {answer['pid']}: " + (f"muenfast {answer.get('command')}" if answer["ok"]
                                                  else f"no answer: {answer.get('error')}"))
            for entry in answer.get("entries", ()):
                _show(entry)
            if (broker := answer.get("broker")) is not None:
                print(f"  broker: {_broker(broker)}")
    return 0 if all(answer["ok"] for answer in answers) else 1


def _broker(broker: dict[str, Any]) -> str:
    if "requests" in broker:
        return f"process {broker['pid']}, {broker['requests']} requests, {broker['refused']} refused"
    return f"process {broker['pid']}, " + ("it has ended" if broker["ended"] else "no answer")


def _show(entry: dict[str, Any]) -> None:
    flags = " read-only" if entry.get("read_only") else ""
    if entry.get("checksum", "off") != "off":
        flags += f" checksums {entry['checksum']}"
    if entry.get("cpu") is not None:
        flags += f" on CPU {entry['cpu']}"
    print(f"  {entry['role']} {entry['req']} {entry['resp']} {entry.get('device', '-')} {entry['size']} bytes{flags}: "
          f"{_state(entry)}")
    devices = _counted(entry)
    for number, device in enumerate(devices):
        if len(devices) > 1:
            print(f"    disk {number}: {device['device']}")
        for name, direction in device["directions"].items():
            if direction["requests"] or direction["depth"] or any(direction["errors"].values()):
                print(f"    {name}: {_line(direction)}")
    counters = {name: value for name, value in entry["counters"].items() if not devices or name not in _SHOWN}
    waiting = {"in flight": entry["in_flight"]} if entry.get("in_flight") else {}
    print(f"    {_words(waiting | counters)}")
    for line in user_lines(entry):
        print(line)
    nbd = entry.get("nbd")
    if isinstance(nbd, dict):
        print(f"    NBD {nbd['socket']}: {_words(nbd['counters'])}")


def _counted(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Its disks; of a process of a version that counted none, none."""
    return [device for device in entry.get("devices", ()) if "directions" in device]


def _line(direction: dict[str, Any]) -> str:
    from muenfast.counts import percentile

    words = [f"{direction['requests']} requests"]
    if direction["bytes"]:
        words.append(f"{direction['bytes'] / 1e6:.1f} MB")
    if direction.get("merged"):
        words.append(f"{direction['merged']} merged")
    half, most = (percentile(direction["latency"], share) for share in (0.5, 0.99))
    if half is not None and most is not None:
        words.append(f"p50 {_us(half)} us, p99 {_us(most)} us")
    if direction["depth"]:
        words.append(f"{direction['depth']} under way")
    words.append(f"at most {direction['deepest']} at a time")
    return ", ".join([*words, *(f"{kind} {count}" for kind, count in direction["errors"].items() if count)])


def _words(counters: object) -> str:
    assert isinstance(counters, dict)
    return ", ".join(f"{name} {value}" for name, value in counters.items() if value) or "no traffic"


def _state(entry: dict[str, Any]) -> str:
    """The state, and why where all fails."""
    return str(entry["state"]) + (f": {entry['failure']}" if entry.get("failure") else "")


# ---- --watch


def _watch(names: list[str], seconds: float, as_json: bool, stop: Stop) -> None:
    """Shows what each interval brought, until a signal comes or stdout has no reader. Processes come and go."""
    screen = not as_json and sys.stdout.isatty()
    before = dict(_disks(_known(names)))
    if not as_json and not screen:
        print(_HEAD, flush=True)
    due = time.monotonic()
    while True:
        due = max(due + seconds, time.monotonic())  # intervals that were missed are not made up for
        if not _rest(due, stop):
            return
        answers = _answers(names)
        after = dict(_disks(answers))
        disks = list(_rates(before, after, seconds))
        silent = [answer for answer in answers if not answer["ok"]]
        if as_json:
            text = json.dumps({"time": round(time.time(), 3), "disks": disks, "silent": silent}) + "\n"
        else:
            lines = list(_rows(disks, silent))
            text = _screenful(lines) if screen else "".join(f"{line}\n" for line in lines)
        sys.stdout.write(text)
        sys.stdout.flush()
        before = after


def _rest(until: float, stop: Stop) -> bool:
    """Waits; False after a signal, and once nobody reads stdout any more."""
    poll = select.poll()
    poll.register(sys.stdout, 0)    # errors and hang-ups are always told
    while not stop.is_set():
        left = until - time.monotonic()
        if poll.poll(min(max(left, 0.0), _LOOK) * 1e3):
            return False
        if left <= 0:
            return True
    return False


def _disks(answers: list[dict[str, Any]]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Each disk, by what makes it the same one next time."""
    now = time.monotonic()
    for answer in answers:
        for entry in answer.get("entries", ()):
            for number, device in enumerate(_counted(entry)):
                disk = {"pid": answer["pid"], "at": answer.get("monotonic", now), "role": entry["role"],
                        "req": entry["req"], "resp": entry["resp"],
                        "device": device.get("device", entry.get("device", "-")),
                        "number": device.get("number", number), "state": entry["state"], "failure": entry.get("failure"),
                        "in_flight": entry.get("in_flight", 0), "directions": device["directions"]}
                yield tuple(disk[name] for name in ("pid", "role", "req", "resp", "number")), disk


def _rates(before: dict[Key, dict[str, Any]], after: dict[Key, dict[str, Any]],
           seconds: float) -> Iterator[dict[str, Any]]:
    """Each disk that is there, with rates in its directions; one that is new brought everything in this interval."""
    from muenfast.counts import rates, since

    for key, disk in after.items():
        old = before.get(key)
        passed = seconds if old is None else max(disk["at"] - old["at"], _LEAST)
        yield {name: value for name, value in disk.items() if name != "at"} | {
            "seconds": round(passed, 3),
            "directions": {name: rates(since(direction, None if old is None else old["directions"][name]), passed)
                           for name, direction in disk["directions"].items()}}


def _rows(disks: list[dict[str, Any]], silent: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each direction in which something went on, one at least for each disk."""
    now = time.strftime("%H:%M:%S")
    for disk in disks:
        name = " ".join(str(disk[word]) for word in ("role", "req", "resp", "device"))
        if disk["state"] not in ("connected", "ready"):
            name += f": {_state(disk)}"
        rows = [(way, rate) for way, rate in disk["directions"].items()
                if rate["requests_per_second"] or rate["errors_per_second"] or rate["depth"]]
        for way, rate in rows:
            yield _TABLE.format(now, way, f"{rate['requests_per_second']:.1f}", f"{rate['bytes_per_second'] / 1e6:.1f}",
                                f"{rate['errors_per_second']:.1f}", rate["depth"], _us(rate["p50_us"]),
                                _us(rate["p99_us"]), name)
        if not rows:
            yield _TABLE.format(now, "-", "0.0", "0.0", "0.0", disk["in_flight"], "-", "-", name)
    for answer in silent:
        yield f"{now}  process {answer['pid']}: no answer: {answer.get('error')}"
    if not disks and not silent:
        yield f"{now}  nothing of this user is serving"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _screenful(lines: list[str]) -> str:
    """The terminal anew: from its first line, no line wrapped, what does not fit counted."""
    width, height = shutil.get_terminal_size()
    room = max(height - 2, 1)
    if len(lines) > room:
        lines = [*lines[:room - 1], f"... and {len(lines) - room + 1} lines more"]
    return "\x1b[H" + "".join(f"{line[:width]}\x1b[K\n" for line in [_HEAD, *lines]) + "\x1b[J"
