"""A small SVG by hand: datagrams and seconds of a get over the number of nodes. Readable on a light and a dark page."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

WIDTH, HEIGHT = 760, 330
LEFT, TOP, PANEL_WIDTH, PANEL_HEIGHT, GAP = 56, 44, 290, 220, 70
# Middle tones with enough contrast on white and on near-black; the text is grey for the same reason.
OURS, STOCK, INK, GRID = "#1f8ad6", "#d9722b", "#7d8590", "#7d859040"
Point = tuple[float, float]


def nice(top: float) -> list[float]:
    """Four to six round ticks from 0 to above `top`."""
    step = 10 ** math.floor(math.log10(top / 4))
    step = next(step * each for each in (1, 2, 2.5, 5, 10) if step * each * 5 >= top)
    return [step * number for number in range(math.ceil(top / step) + 1)]


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{words}</text>'


def line(points: Iterable[Point], colour: str, dashes: str = "") -> str:
    """A line through the points, with a dot at each."""
    found = list(points)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in found)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in found)
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>{dots}'
    )


def panel(
    left: float, title: str, nodes: Sequence[int], top: float, lines: Sequence[tuple[list[tuple[int, float]], str, str]]
) -> str:
    """Axes, the number of nodes on a logarithmic one, and lines of (nodes, value)."""
    ticks = nice(top)
    low, high = math.log(nodes[0]), math.log(max(nodes[-1], nodes[0] + 1))
    x: Callable[[float], float] = lambda count: left + PANEL_WIDTH * (math.log(count) - low) / (high - low)  # noqa: E731
    y: Callable[[float], float] = lambda value: TOP + PANEL_HEIGHT * (1 - value / ticks[-1])  # noqa: E731
    parts = [text(left + PANEL_WIDTH / 2, TOP - 14, title, more='font-weight="bold"')]
    for tick in ticks:
        parts.append(f'<path d="M{left} {y(tick):.1f}h{PANEL_WIDTH}" stroke="{GRID}"/>')
        parts.append(text(left - 6, y(tick) + 4, f"{tick:g}", "end"))
    for count in nodes:
        parts.append(f'<path d="M{x(count):.1f} {TOP + PANEL_HEIGHT}v5" stroke="{INK}"/>')
        parts.append(text(x(count), TOP + PANEL_HEIGHT + 18, f"{count:,}", more='font-size="10"'))
    parts.append(text(left + PANEL_WIDTH / 2, TOP + PANEL_HEIGHT + 36, "nodes (logarithmic)"))
    parts += [
        line([(x(count), y(value)) for count, value in points], colour, dashes) for points, colour, dashes in lines
    ]
    return "".join(parts)


def draw(curve: dict[str, list[dict[str, Any]]]) -> str:
    """The plot as an SVG document."""
    kinds = (("ours", OURS), ("stock", STOCK))
    nodes = [each["nodes"] for each in curve["ours"]]

    def points(kind: str, what: str) -> list[tuple[int, float]]:
        return [(each["nodes"], each[what]) for each in curve[kind]]

    def top(*names: str) -> float:
        return max(each[name] for kind, _ in kinds for each in curve[kind] for name in names)

    datagrams = [(points(kind, "datagrams"), colour, "") for kind, colour in kinds]
    seconds = [
        (points(kind, name), colour, dashes) for kind, colour in kinds for name, dashes in (("p50", ""), ("p95", "5 4"))
    ]
    legend = [(OURS, "", "plasm-dht"), (STOCK, "", "kademlia (stock)"), (INK, "5 4", "p95 of the time")]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        f' font-family="sans-serif" font-size="12" fill="{INK}" role="img">',
        "<title>Datagrams and seconds of a get over the number of nodes</title>",
        panel(LEFT, "datagrams a get", nodes, top("datagrams"), datagrams),
        panel(LEFT + PANEL_WIDTH + GAP, "seconds a get", nodes, top("p50", "p95"), seconds),
    ]
    for index, (colour, dashes, words) in enumerate(legend):
        at = LEFT + 200 * index
        parts.append(
            f'<path d="M{at} {HEIGHT - 12}h28" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'
        )
        parts.append(text(at + 36, HEIGHT - 8, words, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"
