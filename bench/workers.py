"""Processes that take samples in turns, for benchmarks of which each way is a program of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

Worker = subprocess.Popen[str]


def started(stack: ExitStack, words: Sequence[str]) -> Worker:
    """One that says a line once it is there, takes a row's name a line, answers with a sample, ends with its input."""
    worker = stack.enter_context(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    assert worker.stdin is not None and worker.stdout is not None
    stack.callback(worker.stdin.close)
    worker.stdout.readline()
    return worker


def in_turns(workers: Mapping[str, Worker], rows: Sequence[str], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Samples by the worker's name and the row's."""
    taken: dict[str, dict[str, list[float]]] = {way: {row: [] for row in rows} for way in workers}
    for _ in range(rounds):
        for row in rows:
            for way, worker in workers.items():
                assert worker.stdin is not None and worker.stdout is not None
                worker.stdin.write(row + "\n")
                worker.stdin.flush()
                taken[way][row].append(float(worker.stdout.readline()))
    return taken
