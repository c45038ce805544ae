"""Draw what a per-step norm erases and a window keeps: `python docs/figures/window.py` writes the SVG of the README.

Each step is a pre-activation `a_t = u_t w`, as in the adding problem: a fixed vector `w` times a level `u_t`.
The figure shows the scale of each step, `|y_t . w| / |w|^2`, before and after layer normalization.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

import atn_norms as an

HERE = Path(__file__).parent
TARGET = HERE.parent / "_static" / "what-a-window-keeps.svg"
STEPS, FEATURES, WINDOW = 60, 16, 10
INK, ACCENT, PALE = "#3b4252", "#1f6fb2", "#c9d1dc"
STYLE = {
    "svg.hashsalt": "atn-norms",
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def levels() -> torch.Tensor:
    """Return the level of each step `[T]`: a slow wave with three short bursts."""
    t = torch.arange(STEPS, dtype=torch.float64)
    wave = 0.5 + 0.2 * torch.sin(t / 7)
    for start in (14, 31, 48):
        wave[start : start + 3] += 0.8
    return wave


def scales() -> dict[str, torch.Tensor]:
    """Return the scale of each step `[T]` before normalization, after a per-step norm, and after a windowed norm."""
    w = torch.randn(FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = levels()[:, None, None] * (w - w.mean())

    def scale(y: torch.Tensor) -> torch.Tensor:
        return (y.squeeze(1) @ (w - w.mean())) / (w - w.mean()).square().sum()

    norm = an.LayerNorm(FEATURES, eps=0.0).double()
    with torch.no_grad():
        return {
            "pre-activation": scale(a),
            "layer norm, window=1": scale(an.AssortedTime(norm, window=1).scan(a)[0]),
            f"layer norm, window={WINDOW}": scale(an.AssortedTime(norm, window=WINDOW).scan(a)[0]),
        }


def draw(target: Path = TARGET) -> None:
    """Write the figure."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 2.3), layout="constrained")
        axes = figure.subplots(1, 3, sharex=True)
        for axis, (title, values), color in zip(axes, scales().items(), (INK, PALE, ACCENT), strict=True):
            axis.fill_between(range(STEPS), values.numpy(), color=color, alpha=0.25, step="mid", linewidth=0)
            axis.step(range(STEPS), values.numpy(), where="mid", color=INK if color == PALE else color, linewidth=1.4)
            axis.set_title(title, loc="left", color=INK)
            axis.set_ylim(0, 1.15 * float(values.max()))
            axis.set_xlabel("time step")
            axis.set_yticks([0])
        axes[0].set_ylabel("scale of the step")
        target.parent.mkdir(exist_ok=True)
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw()
