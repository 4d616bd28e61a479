"""A picture of what `facet load` measured: latency and throughput over the offered rate, or over time."""

import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

__all__ = ["plot"]

COLORS = {"p50": "#2a78d6", "p99": "#d9692b", "p99_9": "#b39300", "max": "#9ca3af"}
GOOD, BAD = "#1a9e77", "#c0392b"
STYLE = {
    "font.family": "sans-serif", "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e5e7eb", "axes.axisbelow": True, "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "facet",
}


def plot(steps: list[dict[str, Any]]) -> str:
    """SVG text of summaries of `online.load.traffic`: one is drawn over time, several over their rates."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        latency, throughput = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        if len(steps) > 1:
            _over_rates(steps, latency, throughput)
        else:
            _over_time(steps[0]["timeline"], latency, throughput)
        latency.set_yscale("log")
        latency.set_ylabel("latency, ms")
        latency.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        latency.yaxis.set_minor_locator(NullLocator())
        latency.yaxis.set_major_formatter("{x:g}")
        throughput.set_ylabel("requests/s")
        throughput.set_ylim(bottom=0)
        for axes in (latency, throughput):
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return text.getvalue()


def _over_rates(steps: list[dict[str, Any]], latency: Axes, throughput: Axes) -> None:
    rates = [step["rate"] for step in steps]
    for name in ("p50", "p99", "p99_9"):
        values = [step["latency_ms"][name] or float("nan") for step in steps]
        latency.plot(rates, values, "o-", color=COLORS[name], label=name.replace("_", "."))
    in_time = f"within {steps[0]['deadline_ms']:g} ms" if steps[0]["deadline_ms"] else "answered"
    throughput.plot(rates, rates, "--", color=COLORS["max"], label="offered")
    throughput.plot(rates, [step["goodput_per_s"] for step in steps], "o-", color=GOOD, label=in_time)
    failed = [step["failed"] / step["wall_s"] if step["wall_s"] else 0.0 for step in steps]
    throughput.plot(rates, failed, "o-", color=BAD, label="failed")
    throughput.set_xlabel("offered requests/s")


def _over_time(timeline: list[dict[str, Any]], latency: Axes, throughput: Axes) -> None:
    seconds = [entry["second"] for entry in timeline]
    for name in ("p50", "p99", "max"):
        latency.plot(
            seconds, [entry[f"{name}_ms"] or float("nan") for entry in timeline], ".-", color=COLORS[name], label=name
        )
    throughput.bar(seconds, [entry["answered"] for entry in timeline], color=GOOD, label="answered")
    throughput.bar(
        seconds, [entry["failed"] for entry in timeline], bottom=[entry["answered"] for entry in timeline], color=BAD,
        label="failed",
    )
    throughput.set_xlabel("seconds since the start, by when requests were due")
