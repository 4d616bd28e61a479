"""The page's charts: plain numbers in, self-contained SVG text out."""

import io
import re
from collections.abc import Mapping, Sequence
from datetime import datetime

import matplotlib

matplotlib.use("svg")
import matplotlib.dates as mdates
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipelines.contracts.windows import Windows

__all__ = [
    "activity_chart",
    "auc_chart",
    "curve_chart",
    "histogram_chart",
    "rollout_chart",
]

ARM_COLORS = {"scratch": "#7b818c", "contrastive": "#2a78d6", "kge": "#d9692b", "both": "#1a9e77"}
WINDOW_COLORS = {"pretrain": "#d9692b", "finetune": "#2a78d6", "validation": "#b39300", "test": "#1a9e77"}
VERSION_COLORS = ("#2a78d6", "#d9692b", "#1a9e77", "#7a5af5")
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "facet",
}


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    body = text.getvalue()
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', body[body.index("<svg") :], count=1)


def _axes(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    return figure, list(axes[0])


def activity_chart(days: Sequence[datetime], counts: Mapping[str, Sequence[int]], runs: Mapping[str, Windows]) -> str:
    """Events per week by kind, with each run's four windows drawn as bars underneath.

    Args:
        days: start of each week.
        counts: kind -> events in each of those weeks.
    """
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(9.4, 3.6), sharex=True, layout="constrained", height_ratios=[3, 0.35 + 0.35 * len(runs)]
        )
        below = [0] * len(days)
        for position, (kind, values) in enumerate(counts.items()):
            top.bar(days, values, width=6, bottom=below, label=kind, color=VERSION_COLORS[position % 4], align="edge")
            below = [b + v for b, v in zip(below, values, strict=True)]
        top.set_ylabel("events a week")
        top.legend(loc="upper left", ncols=len(counts))
        for row, windows in enumerate(runs.values()):
            for window_name in Windows.ORDER:
                window = getattr(windows, window_name)
                bottom.barh(
                    row, (window.end - window.start).days, left=mdates.date2num(window.start), height=0.62,
                    color=WINDOW_COLORS[window_name], label=window_name if row == 0 else None,
                )
        bottom.set_yticks(range(len(runs)), list(runs))
        bottom.invert_yaxis()
        bottom.grid(False)
        bottom.xaxis.set_major_formatter(mdates.ConciseDateFormatter(bottom.xaxis.get_major_locator()))
        bottom.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=4)
    return _svg(figure)


def curve_chart(panels: Sequence[tuple[str, str, Mapping[str, Sequence[tuple[float, float]]]]]) -> str:
    """Learning curves side by side, with one legend for all.

    Args:
        panels: (title, name of the horizontal axis, line name -> [(x, y), …]).
    """
    figure, axes = _axes(9.4, 2.8, len(panels))
    drawn: dict[str, Line2D] = {}
    with plt.rc_context(STYLE):
        for axis, (title, horizontal, lines) in zip(axes, panels, strict=True):
            for position, (name, points) in enumerate(lines.items()):
                color = ARM_COLORS.get(name, VERSION_COLORS[position % 4])
                style = {"marker": "o", "markersize": 3, "linewidth": 1.5, "color": color}
                (drawn[name],) = axis.plot(*zip(*points, strict=True), **style)
            axis.set_title(title, fontsize=9.5)
            axis.set_xlabel(horizontal)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=len(drawn))
    return _svg(figure)


def auc_chart(auc: Mapping[str, Mapping[str, Mapping[str, object]]]) -> str:
    """One panel a task: each seed's ROC-AUC as a dot, the mean and its 95 % interval as a bar through them."""
    figure, axes = _axes(9.4, 2.7, len(auc))
    with plt.rc_context(STYLE):
        for axis, (task, arms) in zip(axes, auc.items(), strict=True):
            for row, (arm, figures) in enumerate(arms.items()):
                color = ARM_COLORS.get(arm, "#444444")
                interval = {"fmt": "D", "color": color, "capsize": 4, "markersize": 6, "linewidth": 2}
                axis.errorbar(figures["mean"], row, xerr=figures["ci95"], **interval)
                below = [row + 0.22] * len(figures["seeds"])
                axis.plot(figures["seeds"], below, "o", color=color, alpha=0.45, markersize=4)
            axis.set_yticks(range(len(arms)), list(arms))
            axis.invert_yaxis()
            axis.set_title(f"{task}: test ROC-AUC")
            axis.grid(axis="y", visible=False)
    return _svg(figure)


def histogram_chart(edges_ms: Sequence[float], counts: Sequence[int], marks: Mapping[str, float]) -> str:
    """Latency histogram on a logarithmic axis, with percentiles marked.

    Args:
        edges_ms: N+1 bin edges. counts: N counts. marks: percentile name -> milliseconds.
    """
    figure, (axis,) = _axes(9.4, 2.3)
    with plt.rc_context(STYLE):
        filled = [position for position, count in enumerate(counts) if count]
        axis.set_xlim(edges_ms[filled[0]] / 1.3, edges_ms[filled[-1] + 1] * 1.3)
        axis.stairs(counts, edges_ms, fill=True, color=VERSION_COLORS[0], alpha=0.8)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        for position, (name, value) in enumerate(marks.items()):
            axis.axvline(value, color="#374151", linewidth=1, linestyle="--")
            axis.annotate(
                f"{name} {value:.2f} ms", (value, 1 - 0.13 * position), xycoords=("data", "axes fraction"),
                xytext=(4, -9), textcoords="offset points", fontsize=8.5,
            )
        axis.set_xlabel("milliseconds")
        axis.set_ylabel("lookups")
    return _svg(figure)


def rollout_chart(
    seconds: Sequence[float],
    answers: Mapping[str, Sequence[int]],
    steps: Sequence[tuple[float, str]],
    materializing: tuple[float, float],
) -> str:
    """Which version answered when: answers per interval, stacked by version, with the rollout's steps as lines.

    Args:
        seconds: start of each interval since the load began.
        answers: version -> answers in each interval.
        steps: (second, what was done).
        materializing: first and last second of `feast apply` and `feast materialize`.
    """
    figure, (axis,) = _axes(9.4, 3.1)
    with plt.rc_context(STYLE):
        width = seconds[1] - seconds[0] if len(seconds) > 1 else 1.0
        below = [0] * len(seconds)
        for position, (version, values) in enumerate(sorted(answers.items())):
            axis.bar(
                seconds, values, width=width, bottom=below, align="edge", color=VERSION_COLORS[position % 4],
                label=f"answered by version {version}", edgecolor="white", linewidth=0.3,
            )
            below = [b + v for b, v in zip(below, values, strict=True)]
        top, end = max(below, default=1) * 1.55, max(seconds) + width
        axis.set_ylim(0, top)
        axis.set_xlim(0, end)
        axis.axvspan(*materializing, ymin=0.93, color="#9ca3af", alpha=0.35, linewidth=0)
        middle = sum(materializing) / 2
        axis.text(middle, top * 0.965, "feast apply, feast materialize", ha="center", va="center", fontsize=8)
        for position, (second, what) in enumerate(steps):
            left = second > end / 2  # write towards the side that has room
            axis.axvline(second, color="#374151", linewidth=0.9, linestyle="--")
            axis.annotate(
                what, (second, top * (0.9 - 0.08 * (position % 4))), xytext=(-4 if left else 4, -7),
                textcoords="offset points", fontsize=8, ha="right" if left else "left",
            )
        axis.set_xlabel("seconds of live traffic")
        axis.set_ylabel(f"answers per {width:g} s")
        axis.legend(loc="upper left", bbox_to_anchor=(0, 1.14), ncols=4)
    return _svg(figure)
