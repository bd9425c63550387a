"""What becomes of the JSON of `muenfast bench`: two runs compared, plots, tables in a text.

A report is {"benchmark", "environment", "rows"}, as measure.report() makes it; nothing here measures, and nothing is
drawn or written that no report holds.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from muenfast.errors import UsageError

Report = dict[str, Any]
LESS = ("ns", "us", "ms", "%", "KiB", "MiB", "per batch")  # less of it is better; other units count something per second
WHOLE = (*LESS, "Gb/s")  # not in thousands
LEAST_CHANGE = 0.03  # of a median: less is told by no run of another day
LEAST_SAMPLES = 3  # below them there is no spread to speak of


def load(path: str, option: str) -> list[Report]:
    """The reports of a file. Raises UsageError where it holds none, OSError."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"is no JSON: {error}", option=option, value=path) from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", option=option, value=path) from error
    good = isinstance(found, list) and all(
        isinstance(each, dict) and isinstance(each.get("benchmark"), str) and isinstance(each.get("environment"), dict)
        and isinstance(each.get("rows"), list) and all(_good(row) for row in each["rows"]) for each in found)
    if not good:
        raise UsageError("holds no reports of `muenfast bench --json`", option=option, value=path)
    return list(found)


def _good(row: object) -> bool:
    return (isinstance(row, dict) and isinstance(row.get("name"), str) and isinstance(row.get("unit"), str)
            and isinstance(row.get("samples"), list) and all(type(each) in (int, float) for each in row["samples"]))


# ------------------------------------------------------------------ two runs

@dataclass(frozen=True)
class Change:
    """A row of both runs. change: of the median, as a part of the old one. verdict: "better", "worse", "same" (within
    the noise of both, or below LEAST_CHANGE), "unsure" (too few samples). noise: spread of both, as a part of the old
    median."""

    name: str
    unit: str
    old: float
    new: float
    change: float
    noise: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """changes: of rows that both have, in the new one's order. gone, added: names of rows with samples in one only."""

    changes: list[Change]
    gone: list[str]
    added: list[str]

    @property
    def worse(self) -> bool:
        return any(each.verdict == "worse" for each in self.changes)


def spread(samples: Sequence[float]) -> float:
    """The distance between the quartiles: one sample that was disturbed does not make it."""
    if len(samples) < 2:
        return 0.0
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return third - first


def compare(old: Iterable[Report], new: Iterable[Report]) -> Comparison:
    """A median has changed where the two differ by more than the sum of both spreads, and by LEAST_CHANGE at least."""
    before, after = _rows(old), _rows(new)
    changes = []
    for name, row in after.items():
        if name not in before or before[name]["unit"] != row["unit"]:
            continue
        one, two = before[name]["samples"], row["samples"]
        was, now = statistics.median(one), statistics.median(two)
        noise = spread(one) + spread(two)
        base = abs(was) or 1.0
        differs = abs(now - was) > noise and abs(now - was) >= LEAST_CHANGE * abs(was) and now != was
        if min(len(one), len(two)) < LEAST_SAMPLES:
            verdict = "unsure"
        elif not differs:
            verdict = "same"
        else:
            verdict = "better" if (now < was) == (row["unit"] in LESS) else "worse"
        changes.append(Change(name, row["unit"], was, now, (now - was) / base, noise / base, verdict))
    both = {each.name for each in changes}
    return Comparison(changes, [name for name in before if name not in both], [name for name in after if name not in both])


def _rows(reports: Iterable[Report]) -> dict[str, dict[str, Any]]:
    return {f"{report['benchmark']}: {row['name']}": row for report in reports for row in report["rows"] if row["samples"]}


# ------------------------------------------------------------------ figures as text

def figure(value: float, unit: str) -> str:
    """As a table has it."""
    if unit not in WHOLE:
        return f"{value / 1e3:.1f} k{unit}" if value < 1e7 else f"{value / 1e6:.1f} M{unit}"
    return f"{value:.{2 if abs(value) < 10 else 1}f} {unit}"


def ratios(row: dict[str, Any]) -> list[tuple[float, str]]:
    """Those of a report's row, each with what it is of: of a name like the row's own, up to a colon, the rest."""
    head = row["name"].partition(": ")[0] + ": "
    found = row.get("ratios") or {row.get("limit") or "": row.get("ratio")}     # of runs when there was one for each row
    return [(value, name.removeprefix(head)) for name, value in found.items() if value is not None]


def table(report: Report) -> str:
    """A report's rows in Markdown."""
    lines = [f"{report['environment'].get('cpu', '?')}, {report['environment'].get('cpus', '?')} CPUs, Linux "
             f"{report['environment'].get('kernel', '?')}, medians of "
             f"{max((len(row['samples']) for row in report['rows']), default=0)}.", "",
             "| row | median | spread | held against |", "|---|---|---|---|"]
    for row in report["rows"]:
        if not row["samples"]:
            lines.append(f"| {row['name']} | missing: {row.get('missing') or '?'} | | |")
            continue
        median = statistics.median(row["samples"])
        part = f"{100 * spread(row['samples']) / abs(median):.0f} %" if median else ""
        against = ", ".join(f"{value:.2f} of {name}" for value, name in ratios(row))
        lines.append(f"| {row['name']} | {figure(median, row['unit'])} | {part} | {against} |")
    return "\n".join(lines)


_MARK = re.compile(r"<!-- bench (\S+) -->\n.*?<!-- /bench -->", re.DOTALL)


def filled(text: str, reports: Iterable[Report]) -> str:
    """A text with the tables of the reports between `<!-- bench NAME -->` and `<!-- /bench -->`; where there is no such
    report, it keeps what it has. Raises UsageError where it has no marks at all."""
    tables = {report["benchmark"]: table(report) for report in reports}
    if not _MARK.search(text):
        raise UsageError("has no marks <!-- bench NAME --> ... <!-- /bench -->", option="--tables")

    def fill(match: re.Match[str]) -> str:
        found = tables.get(match[1])
        return match[0] if found is None else f"<!-- bench {match[1]} -->\n{found}\n<!-- /bench -->"

    return _MARK.sub(fill, text)


# ------------------------------------------------------------------ plots

_WIDTH, _HEIGHT, _GAP = 560, 300, 20  # of a panel, and between
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 170, 34, 44  # of its axes
# Okabe and Ito's colours that stand out on white and on black.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7a7a7a", "#b8a000")
_STYLE = """<style>
svg { font-family: sans-serif; font-size: 12px }
.paper { fill: #ffffff } text { fill: #1b1b1b } .axis { stroke: #555555; fill: none } .grid { stroke: #dddddd }
.bar { fill: #4a7ab5 } .one { stroke: #b03030 }
@media (prefers-color-scheme: dark) {
.paper { fill: #14171a } text { fill: #e6e6e6 } .axis { stroke: #aaaaaa } .grid { stroke: #33383d }
.bar { fill: #6f9fd8 } .one { stroke: #ff7b72 } }
</style>"""
# scale of Row.at -> title of its panels, and name of the axis
_SCALES = {"bytes": ("throughput over size", "bytes of an element"),
           "batch": ("throughput over batch", "elements of a batch"),
           "depth": ("throughput over depth", "requests in flight"), "exports": ("scaling over exports", "exports"),
           "interfaces": ("scaling over interfaces", "interfaces")}
_PERCENTILES = ("p50", "p90", "p99", "p99.9")

Points = dict[str, list[tuple[float, float]]]


def plot(reports: Iterable[Report]) -> str:
    """An SVG: a panel for each scale and unit of each report that has rows on it, one for percentiles of round trips,
    and a bar for every ratio."""
    reports = list(reports)
    panels = [*_scales(reports), *_tails(reports)]
    bars = [(f"{report['benchmark']}: {row['name']}", value, limit) for report in reports for row in report["rows"]
            if row["samples"] for value, limit in ratios(row)]
    rows = -(-len(panels) // 2)
    top = 40 + rows * (_HEIGHT + _GAP)
    height = top + (40 + 22 * len(bars) if bars else 0)
    width = 2 * _WIDTH + 3 * _GAP
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
             _STYLE, '<rect class="paper" width="100%" height="100%"/>',
             f'<text x="{_GAP}" y="24" font-size="15">muenfast bench: medians, bars of the quartiles\' distance</text>']
    for k, panel in enumerate(panels):
        x, y = _GAP + k % 2 * (_WIDTH + _GAP), 40 + k // 2 * (_HEIGHT + _GAP)
        lines += [f'<g class="panel" transform="translate({x},{y})">', *panel, "</g>"]
    if bars:
        lines += [f'<g class="ratios" transform="translate(0,{top})">', *_bars(bars), "</g>"]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _bars(bars: Sequence[tuple[str, float, str]]) -> list[str]:
    lines = [f'<text x="{_GAP}" y="18" font-size="15">figure / limit of the same run (1 = equal; longer is better)</text>']
    scale = 380 / max([1.2, *(value for _, value, _ in bars)])
    for k, (what, value, limit) in enumerate(bars):
        y = 28 + 22 * k
        lines.append(f'<text x="{_GAP}" y="{y + 13}">{escape(what)}</text>')
        lines.append(f'<rect class="bar" x="420" y="{y + 2}" width="{value * scale:.1f}" height="15"/>')
        lines.append(f'<text x="{426 + value * scale:.1f}" y="{y + 14}">{value:.2f} of {escape(limit)}</text>')
    lines.append(f'<line class="one" x1="{420 + scale:.1f}" y1="26" x2="{420 + scale:.1f}" y2="{30 + 22 * len(bars)}"/>')
    return lines


def _scales(reports: Sequence[Report]) -> list[list[str]]:
    """A panel where a line has two points at least."""
    found: dict[tuple[str, str, str], Points] = {}
    spreads: dict[tuple[str, str, str], dict[tuple[str, float], float]] = {}
    for report in reports:
        for row in report["rows"]:
            at = row.get("at") or {}
            for scale in at:
                if not row["samples"] or scale not in _SCALES:
                    continue
                line = " ".join([str(row.get("line") or row["name"]),
                                 *(f"{name} {value}" for name, value in at.items() if name != scale)])
                value, factor, unit = statistics.median(row["samples"]), 1.0, row["unit"]
                if scale == "bytes" and unit not in LESS:       # to be compared with each other
                    factor, unit = at["bytes"] / 1e9, "GB/s"
                key = report["benchmark"], scale, unit
                found.setdefault(key, {}).setdefault(line, []).append((at[scale], value * factor))
                spreads.setdefault(key, {})[line, at[scale]] = spread(row["samples"]) * factor
    panels = []
    for (what, scale, unit), points in found.items():
        points = {name: sorted(line) for name, line in points.items() if len(line) > 1}
        if points:
            title, axis = _SCALES[scale]
            panels.append(_chart(f"{what}: {title}", axis, unit, points, spreads[what, scale, unit]))
    return panels


def _tails(reports: Sequence[Report]) -> list[list[str]]:
    panels = []
    for report in reports:
        points: Points = {}
        for row in report["rows"]:
            notes = row.get("notes") or {}      # of runs before there were any
            seen = {name: notes[name]["median"] for name in _PERCENTILES if name in notes}
            if row["samples"] and row["name"].endswith(", p99") and row["unit"] in LESS:
                seen["p99"] = statistics.median(row["samples"])
            if row["samples"] and row["name"].endswith(", median") and row["unit"] in LESS:
                seen["p50"] = statistics.median(row["samples"])
            line = [(float(k), seen[name]) for k, name in enumerate(_PERCENTILES) if name in seen]
            if len(line) > 1:
                points[row["name"].removesuffix(", p99").removesuffix(", median")] = line
        if points:
            panels.append(_chart(f"{report['benchmark']}: round trips, percentiles", "", "ns", points, {}, _PERCENTILES))
    return panels


def _chart(title: str, across: str, up: str, lines: Points, spreads: dict[tuple[str, float], float],
           names: Sequence[str] = ()) -> list[str]:
    """One panel: both axes logarithmic, but that of names. Figures that are not above 0 stand at the foot."""
    right, foot = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    xs = sorted({x for line in lines.values() for x, _ in line})
    ys = [y for line in lines.values() for _, y in line if y > 0] or [1.0]
    low, high = math.floor(math.log10(min(ys)) * 2) / 2, math.ceil(math.log10(max(ys)) * 2 + 1e-9) / 2
    high = max(high, low + 0.5)

    def x_of(x: float) -> float:
        if names:
            return _LEFT + 20 + x * (right - _LEFT - 40) / (len(names) - 1)
        span = math.log2(xs[-1]) - math.log2(xs[0])
        return _LEFT + 10 + (math.log2(x) - math.log2(xs[0])) / span * (right - _LEFT - 20)

    def y_of(y: float) -> float:
        return foot if y <= 0 else min(float(foot), foot - (math.log10(y) - low) / (high - low) * (foot - _TOP))

    out = [f'<text x="0" y="16" font-size="14">{escape(title)}</text>',
           f'<path class="axis" d="M{_LEFT},{_TOP}V{foot}H{right}"/>',
           f'<text x="{right}" y="{_HEIGHT - 8}" text-anchor="end">{escape(across)}</text>',
           f'<text x="0" y="{_TOP - 2}">{escape(up)}</text>']
    for k in range(math.ceil(low * 2), math.floor(high * 2) + 1):
        if k % 2 == 0 or high - low <= 2:
            y = 10 ** (k / 2)
            out.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>')
            out.append(f'<text x="{_LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{_short(y)}</text>')
    for x in xs:
        label = names[int(x)] if names else _short(x)
        out.append(f'<text x="{x_of(x):.1f}" y="{foot + 16}" text-anchor="middle">{label}</text>')
    for k, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[k % len(_COLOURS)]
        dash = ' stroke-dasharray="5 3"' if k >= len(_COLOURS) else ""
        way = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line)
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2"{dash} points="{way}"/>')
        for x, y in line:
            out.append(f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" fill="{colour}"/>')
            if half := spreads.get((name, x), 0.0) / 2:
                out.append(f'<line stroke="{colour}" x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{y_of(y - half):.1f}" '
                           f'y2="{y_of(y + half):.1f}"/>')
        y = _TOP + 14 * k + 8
        out.append(f'<circle cx="{right + 10}" cy="{y - 4}" r="4" fill="{colour}"/>')
        out.append(f'<text x="{right + 18}" y="{y}" font-size="10">{escape(name)}</text>')
    return out


def _short(value: float) -> str:
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.3g}{letter}"
    return f"{value:.2g}"
