"""A page of small plots as one SVG file: panels in rows under one legend. No library, no script, no font but the reader's."""

from html import escape
from math import floor, log10

# Colours that stay apart for most eyes and in grey (after Okabe and Ito), by name so that an index has the same in every plot.
# What others made is dashed.
COLOURS = {
    "sketch": "#0072b2",
    "roar": "#d55e00",
    "roar-seen": "#8c3b00",
    "wave": "#009e73",
    "quest": "#cc79a7",
    "ivf": "#e69f00",
    "hnsw": "#56b4e9",
    "exact": "#222222",
    "faiss-ivf": "#b58900",
    "ivf-faiss": "#b58900",
    "faiss-hnsw": "#1f78a8",
    "hnsw-faiss": "#1f78a8",
    "hnswlib": "#7f7f7f",
}
OTHERS = ("faiss-ivf", "faiss-hnsw", "ivf-faiss", "hnsw-faiss", "hnswlib")
# What the eye is to find first.
FIRST = "sketch"

MARGIN = 28
WIDTH, HEIGHT, GAP = 300, 250, 34
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 44, 44
INK, SOFT, GRID = "#1a1a1a", "#5c5c5c", "#e8e8e8"


def colour(name):
    return COLOURS.get(name, "#444444")


def dash(name):
    return ' stroke-dasharray="5 3"' if name in OTHERS else ""


def weight(name):
    return 2.6 if name == FIRST else 1.6


def ticks_of(low, high, marks=(1, 2, 5)):
    """Decades and their parts between two positive numbers."""
    out = []
    for power in range(floor(log10(low)), floor(log10(high)) + 1):
        out += [m * 10**power for m in marks if low * 0.9999 <= m * 10**power <= high * 1.0001]
    return out


class Axis:
    """From a value to a place; `kind` is log or linear. What lies outside is put at the end."""

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


def text(x, y, words, anchor="start", size=11, fill=INK, extra=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{extra}>{escape(words)}</text>'


def line(x1, y1, x2, y2, stroke=GRID, extra=""):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}"{extra}/>'


def percent(value):
    return f"{100 * value:.3g} %"


def titled(title, label):
    return [
        text(LEFT, 16, title, size=13, extra=' font-weight="600"'),
        text(LEFT, 32, label, size=10.5, fill=SOFT),
    ]


def under(x, label, marks=(1, 2, 5)):
    """The axis of shares below a plot: lines, ticks, and what they are."""
    out = []
    for tick in ticks_of(x.low, x.high, marks):
        out.append(line(x.at(tick), TOP, x.at(tick), HEIGHT - BOTTOM))
        out.append(text(x.at(tick), HEIGHT - BOTTOM + 15, f"{100 * tick:g}", "middle", 10, SOFT))
    out.append(line(x.start, HEIGHT - BOTTOM, x.end, HEIGHT - BOTTOM, "#9a9a9a"))
    out.append(text((x.start + x.end) / 2, HEIGHT - 10, label, "middle", 10.5, SOFT))
    return out


def lines(title, x_label, y_label, curves, x_range, y_range, y_kind="linear", mark=None):
    """`curves`: name to points of `(x, y)`, x on a logarithmic axis and in shares. `mark`: a level to draw, with its words."""
    x = Axis(*x_range, LEFT, WIDTH - RIGHT, "log")
    y = Axis(*y_range, HEIGHT - BOTTOM, TOP, y_kind)
    out = [*titled(title, y_label), *under(x, x_label)]
    for tick in y.ticks():
        place = y.at(tick)
        out.append(line(LEFT, place, WIDTH - RIGHT, place))
        out.append(text(LEFT - 6, place + 3.5, f"{tick:g}" if y_kind == "log" else f"{tick:.1f}", "end", 10, SOFT))
    if mark is not None:
        place = y.at(mark[0])
        out.append(line(LEFT, place, WIDTH - RIGHT, place, "#777777", ' stroke-dasharray="2 3"'))
        out.append(text(LEFT + 4, place + 11, mark[1], size=9.5, fill=SOFT))
    # The first one last, so that it lies on top.
    for name in sorted(curves, key=lambda name: name == FIRST):
        points = sorted((a, b) for a, b in curves[name] if a is not None and b is not None and x_range[0] <= a <= x_range[1])
        if not points:
            continue
        path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in points)
        out.append(f'<polyline fill="none" stroke="{colour(name)}" stroke-width="{weight(name)}" stroke-linejoin="round" points="{path}"{dash(name)}/>')
        if len(points) <= 12:
            out += [f'<circle cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="2.2" fill="{colour(name)}"/>' for a, b in points]
    return out


def dots(title, label, x_label, values, x_range):
    """A dot per name on a logarithmic axis of shares, the least on top; `values`: name to share."""
    left = LEFT + 42
    x = Axis(*x_range, left, WIDTH - RIGHT - 4, "log")
    out = [*titled(title, label), *under(x, x_label, marks=(1, 3))]
    step = (HEIGHT - BOTTOM - TOP) / max(1, len(values))
    for row, (name, value) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        place = TOP + step * (row + 0.5)
        strong = ' font-weight="600"' if name == FIRST else ""
        out.append(text(left - 8, place + 3.5, name, "end", 10.5, colour(name), strong))
        out.append(line(left, place, x.at(value), place, colour(name), f' stroke-width="{weight(name)}"{dash(name)}'))
        out.append(f'<circle cx="{x.at(value):.1f}" cy="{place:.1f}" r="4" fill="{colour(name)}"/>')
        beyond = x.at(value) > WIDTH - RIGHT - 60
        words = percent(value)
        out.append(text(x.at(value) + (-9 if beyond else 9), place - 5 if beyond else place + 3.5, words, "end" if beyond else "start", 10))
    return out


def legend(names, y):
    out, x = [], MARGIN
    for name in names:
        out.append(line(x, y - 4, x + 24, y - 4, colour(name), f' stroke-width="{weight(name)}"{dash(name)}'))
        out.append(text(x + 30, y, name, size=11.5, fill=colour(name), extra=' font-weight="600"' if name == FIRST else ""))
        x += 46 + 7 * len(name)
    return out


def page(heading, notes, names, rows):
    """`rows`: pairs of a title and panels, each a list of elements; `names` are those of the legend."""
    columns = max(len(panels) for _, panels in rows)
    top = 62 + 16 * len(notes)
    row_height = HEIGHT + 48
    width = 2 * MARGIN + columns * WIDTH + (columns - 1) * GAP
    height = top + len(rows) * row_height + 12
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, -apple-system, Helvetica, Arial, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        text(MARGIN, 30, heading, size=19, extra=' font-weight="700"'),
    ]
    out += [text(MARGIN, 50 + 16 * at, note, size=11.5, fill=SOFT) for at, note in enumerate(notes)]
    out += legend(names, top - 2)
    for row, (title, panels) in enumerate(rows):
        y = top + row * row_height + 14
        out.append(line(MARGIN, y, width - MARGIN, y, "#c9c9c9"))
        out.append(text(MARGIN, y + 22, title, size=14, extra=' font-weight="700"'))
        for column, panel in enumerate(panels):
            out.append(f'<g transform="translate({MARGIN + column * (WIDTH + GAP)},{y + 32})">')
            out += panel
            out.append("</g>")
    return "\n".join([*out, "</svg>", ""])
