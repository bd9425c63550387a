"""A policy's information flow, drawn: as text, and as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

from muenfast.policy import OPERATOR, Flow, Policy

__all__ = ["svg", "text"]

_ARROWS = {"channel": "-->", "bell": "..>", "buffer": "==>", "path MTUs": "-->"}
_STYLES = {"channel": ("#1f5fa8", ""), "bell": ("#999999", "4 4"), "buffer": ("#a8321f", ""), "path MTUs": ("#5f7f2f", "")}
_WIDE, _LINE, _GLYPH = 190, 16, 6.6     # of a box, of its lines, of a letter
_MARGIN, _BEND = 60, 46                 # around all, and how far apart are the lines between two boxes


def _through(policy: Policy, flow: Flow) -> str:
    region = policy.regions[flow.through]
    if flow.kind == "bell":
        return f"{flow.through}, its bell"
    protocol = "" if region.protocol is None else f", protocol {region.protocol:x}"
    way = ", strict one-way" if flow.kind == "channel" and not region.bell else ""
    return f"{flow.through} ({flow.kind}, {region.size} bytes{protocol}{way})"


def text(policy: Policy) -> list[str]:
    """One line for each flow, by its source; then whom what each subject knows may come to."""
    flows = policy.flows()
    wide = max((len(name) for name in [*policy.subjects, OPERATOR]), default=0)
    lines = [f"{flow.source:<{wide}} {_ARROWS[flow.kind]} {flow.target:<{wide}}  {_through(policy, flow)}"
             for flow in sorted(flows, key=lambda flow: (flow.source, flow.target, flow.through, flow.kind))]
    lines += [f"{name} may reach {', '.join(policy.reach(name)) or 'nobody'}" for name in sorted(policy.subjects)]
    return lines


def _notes(policy: Policy, subject: str) -> Iterator[str]:
    for connection in policy.connections.values():
        if connection.server == subject:
            yield f"serves {connection.name}: {', '.join(connection.devices)}"
        if connection.client == subject:
            yield f"has the disks of {connection.name}"
    for interface in policy.interfaces.values():
        if interface.subject == subject:
            yield f"interface {interface.name}"


def svg(policy: Policy) -> str:
    """Subjects as boxes on an ellipse, flows as arrows: channels, buffers, bells (dotted)."""
    flows = policy.flows()
    names = [*policy.subjects, *([OPERATOR] if any(flow.source == OPERATOR for flow in flows) else [])]
    boxes = {name: [name, *([f"user {policy.subjects[name].user}"] if name in policy.subjects else []),
                    *_notes(policy, name)] for name in names}
    wide = {name: max(_WIDE, max(len(line) for line in lines) * _GLYPH + 20) for name, lines in boxes.items()}
    high = {name: len(lines) * _LINE + 14 for name, lines in boxes.items()}
    across, down = max(wide.values(), default=_WIDE), max(high.values(), default=_LINE)
    count = max(1, len(names))
    rx = 0.0 if count == 1 else max(across * 1.1, count * across / 4)
    ry = 0.0 if count <= 2 else max(down * 1.4, count * down / 3, 150.0)
    width = 2 * (rx + across / 2 + _MARGIN)
    height = 2 * (ry + down / 2 + _MARGIN + (_BEND * len(flows) / 2 if count <= 2 else _BEND))
    at = {name: (width / 2 - rx * math.cos(2 * math.pi * i / count), height / 2 - ry * math.sin(2 * math.pi * i / count))
          for i, name in enumerate(names)}
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
           f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif" font-size="12">',
           f"<title>information flow of {escape(policy.path)}</title>", '<rect width="100%" height="100%" fill="#ffffff"/>',
           "<defs>"]
    out += [f'<marker id="{kind.replace(" ", "-")}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{color}"/></marker>' for kind, (color, _) in _STYLES.items()]
    out.append("</defs>")
    beside: dict[tuple[str, str], int] = {}
    for flow in sorted(flows, key=lambda flow: (flow.source, flow.target, flow.through, flow.kind)):
        pair = flow.source, flow.target
        beside[pair] = beside.get(pair, 0) + 1
        out += _arrow(policy, flow, at, wide, high, beside[pair])
    for name, lines in boxes.items():
        x, y = at[name][0] - wide[name] / 2, at[name][1] - high[name] / 2
        out.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide[name]:.1f}" height="{high[name]}" rx="6" fill="#f4f4f0" '
                   'stroke="#333333"/>')
        out += [f'<text x="{at[name][0]:.1f}" y="{y + 18 + i * _LINE:.1f}" text-anchor="middle"'
                f'{" font-weight=" + quoteattr("bold") if i == 0 else ""}>{escape(line)}</text>'
                for i, line in enumerate(lines)]
    out.append("</svg>")
    return "\n".join(out) + "\n"


def _arrow(policy: Policy, flow: Flow, at: dict[str, tuple[float, float]], wide: dict[str, float], high: dict[str, int],
           turn: int) -> Iterator[str]:
    """A curve from box to box, further out the later its turn: those of the other direction are on the other side."""
    (x0, y0), (x1, y1) = at[flow.source], at[flow.target]
    length = math.hypot(x1 - x0, y1 - y0) or 1.0
    aside = _BEND * (turn - 0.5)
    mx, my = (x0 + x1) / 2 - (y1 - y0) / length * 2 * aside, (y0 + y1) / 2 + (x1 - x0) / length * 2 * aside
    sx, sy = _edge(x0, y0, mx, my, wide[flow.source], high[flow.source])
    tx, ty = _edge(x1, y1, mx, my, wide[flow.target], high[flow.target])
    color, dashes = _STYLES[flow.kind]
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    yield (f'<path d="M{sx:.1f} {sy:.1f}Q{mx:.1f} {my:.1f} {tx:.1f} {ty:.1f}" fill="none" stroke="{color}"{dashed} '
           f'stroke-width="1.5" marker-end="url(#{flow.kind.replace(" ", "-")})"><title>{escape(flow.source)} to '
           f'{escape(flow.target)}: {escape(_through(policy, flow))}</title></path>')
    lx, ly = (sx + 2 * mx + tx) / 4, (sy + 2 * my + ty) / 4
    label = f"{flow.through} (bell)" if flow.kind == "bell" else flow.through
    yield (f'<text x="{lx:.1f}" y="{ly:.1f}" text-anchor="middle" fill="{color}" stroke="#ffffff" stroke-width="3" '
           f'paint-order="stroke">{escape(label)}</text>')


def _edge(x: float, y: float, tx: float, ty: float, wide: float, high: float) -> tuple[float, float]:
    """Where the line from a box's middle to (tx, ty) leaves it."""
    dx, dy = tx - x, ty - y
    scale = min(wide / 2 / abs(dx) if dx else math.inf, high / 2 / abs(dy) if dy else math.inf, 1.0)
    return x + dx * scale, y + dy * scale
