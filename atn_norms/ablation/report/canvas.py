"""The style of all pictures, and their bytes: the same record always gives the same file."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from atn_norms.ablation.analysis.intervals import EXPLODED
from atn_norms.ablation.report.names import MINUS, shortened
from atn_norms.ablation.store.records import Goal

INK = "#1b1f24"
MUTED = "#5b636d"
RULE = "#d5d9de"
PAPER = "#fefefe"
EDGE = 0.06  # inches of paper left of a headline
ALERT = "#b0500c"
# Okabe and Ito's palette without its yellow, which is too faint on white; distinct with any common colour vision.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", (0, (4, 1.4)), (0, (1.2, 1.2)))

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a label such as "$x$" is a name, not a formula
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "figure.facecolor": PAPER,
    "svg.fonttype": "none",  # text stays text: searchable, read aloud, and small
    "svg.hashsalt": "atn-norms",
}


def style() -> AbstractContextManager[None]:
    """Return a context that draws and saves figures in the style of the report, without the user's matplotlibrc."""
    plain: dict[Any, Any] = dict(matplotlib.rcParamsDefault)
    del plain["backend"]  # other code in this process may draw
    plain.update(_STYLE)
    return matplotlib.rc_context(plain)


@dataclass(frozen=True)
class Picture:
    """A finished picture: `name` of its files, `title`, `text` for screen readers, `svg` and `png`."""

    name: str
    title: str
    text: str
    svg: str
    png: bytes

    @property
    def inline(self) -> str:
        """The SVG for a page: with the colours and the width of the page, and without an XML prologue."""
        names = {
            INK: "var(--ink)",
            MUTED: "var(--muted)",
            RULE: "var(--rule)",
            PAPER: "var(--paper)",
            ALERT: "var(--alert)",
            SERIES[0]: "var(--blue)",
        }
        svg = self.svg[self.svg.index("<svg") :]
        svg = _in_tags(svg, "|".join(names), lambda match: names[match[0]])
        return re.sub(r'<svg [^>]*?width="([\d.]+)pt"', _fluid, svg, count=1)


def _fluid(match: re.Match[str]) -> str:
    return match[0].replace(f'width="{match[1]}pt"', f'style="--width: {match[1]}pt"')


_DPI = 160
_MOST_PIXELS = 65_000  # of a side: browsers and some versions of matplotlib reject 65,536


def save(figure: Figure, name: str, title: str, text: str) -> Picture:
    """Render a figure as PNG and SVG without dates or random ids."""
    FigureCanvasAgg(figure)
    png = io.BytesIO()
    dpi = min(_DPI, _MOST_PIXELS / max(figure.get_size_inches()))
    figure.savefig(png, format="png", dpi=dpi, metadata={"Software": None})
    FigureCanvasSVG(figure)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(name, title, text, _accessible(svg.getvalue(), name, title, text), png.getvalue())


def _accessible(svg: str, name: str, title: str, text: str) -> str:
    """Prefix every id with the picture's name, so several share a page, and add a title and a description."""
    svg = _in_tags(svg, r'(\bid="|url\(#|href="#)', lambda match: f"{match[0]}{name}-")
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = _compact(svg).replace("<svg ", f'<svg role="img" aria-labelledby="{name}-title {name}-desc" ', 1)
    labels = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(text)}</desc>'
    start = svg.index(">", svg.index("<svg ")) + 1
    return svg[:start] + labels + svg[start:]


def _compact(svg: str) -> str:
    """Round coordinates to 0.01 points, write lines relative to their start, and drop ids and spaces without a use."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = _in_tags(svg, r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "")
    svg = _in_tags(svg, r"\d+\.\d{3,}", lambda match: _points(round(100 * float(match[0]))))
    return _in_tags(re.sub(r">\s+<", "><", svg), r'\bd="([MLz\s\d.-]+)"', _relative)


def _relative(path: re.Match[str]) -> str:
    """Write a path of straight lines with the differences between its points, and without repeated letters."""
    words, last, here = [], "", (0, 0)
    for command, x, y in re.findall(r"([ML])\s*(\S+)\s+([^\sMLz]+)|z", path[1]):
        before, here = here, (round(100 * float(x or 0)), round(100 * float(y or 0)))
        start = before if command == "L" else (0, 0)
        words += [] if command == last == "L" else [command.replace("L", "l") or "z"]
        words += [_points(here[0] - start[0]), _points(here[1] - start[1])] if command else []
        last = command
    text = re.sub(r" (?=-)|(?<=[Mlz]) | (?=[Mlz])", "", " ".join(words))  # a sign and a letter separate numbers
    return f'd="{re.sub(r"(?<![0-9])0(?=[.])", "", text)}"'


def _points(hundredths: int) -> str:
    return f"{hundredths / 100:.2f}".rstrip("0").rstrip(".")


def _in_tags(svg: str, pattern: str, replace: Callable[[re.Match[str]], str]) -> str:
    """Substitute inside tags alone, because the text between tags may contain the same characters."""
    return re.sub(r"<[^<>]+>", lambda tag: re.sub(pattern, replace, tag[0]), svg)


def tidy(axes: Axes, grid: str) -> None:
    """Draw light grid lines for an axis (`x`, `y` or `both`), without tick marks."""
    axes.grid(visible=True, axis=grid)  # type: ignore[arg-type]
    axes.tick_params(length=3)


def inches(figure: Figure, *, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes at a position in inches, so that sizes do not depend on the number of cells."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def write(figure: Figure, left: float, bottom: float, text: str, **options: Any) -> None:
    """Write a text at a position in inches."""
    across, up = figure.get_size_inches()
    figure.text(left / across, bottom / up, text, va="center", **options)


def headline(figure: Figure, text: str) -> None:
    """Write the title of a figure, cut to the width of the figure."""
    width, height = figure.get_size_inches()
    write(figure, EDGE, height - 0.24, shortened(text, int(width / 0.1)), fontsize=11, fontweight="bold")


def logarithmic(values: Sequence[float], goal: Goal) -> bool:
    """Return True if an axis is logarithmic: for positive losses that differ by a factor of ten or more."""
    return goal == "min" and bool(values) and min(values) > 1 / EXPLODED and max(values) >= 10 * min(values)


def scale(axes: Axes, which: str, values: Sequence[float], goal: Goal) -> None:
    """Set scale, limits and plain decimal labels of the `x` or `y` axis from all of its values."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    axis = axes.xaxis if which == "x" else axes.yaxis
    limit = axes.set_xlim if which == "x" else axes.set_ylim
    if logarithmic(values, goal):
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        edge = (high / low) ** 0.05
        axis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", MINUS)))
        axis.set_minor_formatter(NullFormatter())
        limit(low / edge, high * edge)
    else:
        edge = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        limit(low - edge, high + edge)


def look(place: int | None) -> dict[str, Any]:
    """Return colour and dash of the n-th label of the axis across; black for a point without a label."""
    if place is None:
        return {"color": INK, "linestyle": DASHES[0]}
    return {"color": SERIES[place % len(SERIES)], "linestyle": DASHES[place // len(SERIES) % len(DASHES)]}
