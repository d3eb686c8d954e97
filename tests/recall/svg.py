"""A page of small plots as one SVG file: axes, lines with direct labels, bars. No library, no script, no font but the reader's."""

from html import escape
from math import floor, log10

# Colours that stay apart for most eyes and in grey (Okabe and Ito), by name so that an index has the same in every plot.
COLOURS = {
    "sketch": "#0072b2",
    "roar": "#d55e00",
    "roar-seen": "#8c3b00",
    "wave": "#009e73",
    "quest": "#cc79a7",
    "ivf": "#e69f00",
    "hnsw": "#56b4e9",
    "flat": "#000000",
    "faiss-ivf": "#a87400",
    "faiss-hnsw": "#2a7fa8",
    "hnswlib": "#707070",
}
WIDTH, HEIGHT = 440, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 118, 40, 44


def colour(name):
    return COLOURS.get(name, "#444444")


def ticks_of(low, high):
    """Decades and their halves between two positive numbers."""
    out = []
    for power in range(floor(log10(low)), floor(log10(high)) + 1):
        out += [m * 10**power for m in (1, 2, 5) if low <= m * 10**power <= high * 1.0001]
    return out


class Axis:
    """From a value to a place; `kind` is log or linear."""

    def __init__(self, low, high, start, end, kind="linear"):
        self.low, self.high, self.start, self.end, self.kind = low, high, start, end, kind

    def at(self, value):
        low, high = (log10(self.low), log10(self.high)) if self.kind == "log" else (self.low, self.high)
        value = log10(max(value, self.low)) if self.kind == "log" else value
        share = (value - low) / (high - low or 1)
        return self.start + min(1, max(0, share)) * (self.end - self.start)

    def ticks(self):
        if self.kind == "log":
            return ticks_of(self.low, self.high)
        steps = 5
        return [self.low + (self.high - self.low) * at / steps for at in range(steps + 1)]


def text(x, y, words, anchor="start", size=11, fill="#333333", extra=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{extra}>{escape(words)}</text>'


def percent(value):
    return f"{100 * value:g} %"


def apart(places, least=12):
    """Moves labels apart: places rise, each at least `least` behind the one before, as little moved as a single pass allows."""
    out = []
    for place in places:
        out.append(max(place, out[-1] + least) if out else place)
    over = out[-1] - (HEIGHT - BOTTOM) if out else 0
    return [place - max(0, over) for place in out]


def lines(title, x_label, y_label, curves, x_range, y_range, y_kind="linear", mark=None):
    """`curves`: name to points of `(x, y)`, x on a logarithmic axis and in shares. `mark`: a level to draw, with its words."""
    x = Axis(*x_range, LEFT, WIDTH - RIGHT, "log")
    y = Axis(*y_range, HEIGHT - BOTTOM, TOP, y_kind)
    out = [text(LEFT, 18, title, size=13, fill="#000000", extra=' font-weight="bold"'), text(LEFT, 32, y_label, size=10)]
    for tick in y.ticks():
        place = y.at(tick)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}" stroke="#e4e4e4"/>')
        out.append(text(LEFT - 6, place + 4, f"{tick:g}" if y_kind == "log" else f"{tick:.2f}", "end", 10))
    for tick in x.ticks():
        place = x.at(tick)
        out.append(f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}" stroke="#888888"/>')
        out.append(text(place, HEIGHT - BOTTOM + 16, percent(tick), "middle", 10))
    out.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle", 11))
    if mark is not None:
        place = y.at(mark[0])
        out.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}" stroke="#999999" stroke-dasharray="4 3"/>'
        )
        out.append(text(LEFT + 4, place - 4, mark[1], size=10, fill="#666666"))
    ends = []
    for name, points in curves.items():
        points = sorted((a, b) for a, b in points if a is not None and b is not None and x_range[0] <= a <= x_range[1])
        if not points:
            continue
        path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in points)
        out.append(f'<polyline fill="none" stroke="{colour(name)}" stroke-width="1.8" points="{path}"/>')
        out += [f'<circle cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="2.2" fill="{colour(name)}"/>' for a, b in points]
        ends.append((y.at(points[-1][1]), x.at(points[-1][0]), name))
    ends.sort()
    for (place, end, name), moved in zip(ends, apart([end[0] for end in ends]), strict=True):
        side = WIDTH - RIGHT + 8
        out.append(f'<line x1="{end:.1f}" x2="{side - 2}" y1="{place:.1f}" y2="{moved:.1f}" stroke="{colour(name)}" stroke-width=".6"/>')
        out.append(text(side, moved + 4, name, size=10, fill=colour(name)))
    return out


def bars(title, label, values, mark=None):
    """Horizontal bars, the shortest first; `values`: name to `(value, words)`."""
    ranked = sorted(values.items(), key=lambda item: item[1][0])
    most = max((value for value, _ in values.values()), default=1)
    left, right = 128, 96
    out = [text(16, 18, title, size=13, fill="#000000", extra=' font-weight="bold"'), text(16, 32, label, size=10)]
    step = min(28, (HEIGHT - TOP - 20) / max(1, len(ranked)))
    for row, (name, (value, words)) in enumerate(ranked):
        y = TOP + 8 + row * step
        width = (WIDTH - left - right) * value / most
        out.append(f'<rect x="{left}" y="{y:.1f}" width="{width:.1f}" height="{step * 0.62:.1f}" fill="{colour(name)}"/>')
        out.append(text(left - 6, y + step * 0.5, name, "end", 10))
        out.append(text(left + width + 5, y + step * 0.5, words, size=10))
    return out


def page(heading, notes, rows):
    """Rows of plots; `rows` is a list of lists of element lists."""
    columns = max(len(row) for row in rows)
    top = 34 + 15 * len(notes)
    width, height = columns * WIDTH, top + len(rows) * HEIGHT + 10
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        text(16, 24, heading, size=16, fill="#000000", extra=' font-weight="bold"'),
    ]
    out += [text(16, 42 + 15 * at, note, size=11) for at, note in enumerate(notes)]
    for row, plots in enumerate(rows):
        for column, plot in enumerate(plots):
            out.append(f'<g transform="translate({column * WIDTH},{top + row * HEIGHT})">')
            out += plot
            out.append("</g>")
    return "\n".join([*out, "</svg>", ""])
