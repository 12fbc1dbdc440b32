"""The picture of a report: what each series does of what so many devices could."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.plot import FAINT, INK

COLORS = {"compressed": "#9aa7b0", "step": "#4c8c2b"}


def draw(reports: list[dict[str, Any]], path: str) -> None:
    """Draws the efficiency of every series of each report, a bar for each number of devices."""
    plt.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK})
    rows = [[r for r in report["series"] if r["devices"] > 1] for report in reports]
    heights = [len(of_report) for of_report in rows]
    figure, panels = plt.subplots(
        len(reports), 1, figsize=(9, 0.8 * len(reports) + 0.27 * sum(heights)),
        layout="constrained", squeeze=False, height_ratios=heights,
    )  # fmt: skip
    for axes, report, of_report in zip(panels[:, 0], reports, rows, strict=True):
        _draw_panel(axes, report["machine"], of_report)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_panel(axes: Any, machine: dict[str, str], rows: list[dict[str, Any]]) -> None:
    places = np.arange(len(rows))
    values = [100 * row["efficiency"] for row in rows]
    for part, color in COLORS.items():
        mine = [i for i, row in enumerate(rows) if row["part"] == part]
        axes.barh(places[mine], [values[i] for i in mine], 0.8, color=color, label=part)
    for place, value, row in zip(places, values, rows, strict=True):
        axes.annotate(
            f"{value:.0f}", (value, place), (3, 0), textcoords="offset points", va="center",
            fontsize=8, color=COLORS[row["part"]],
        )  # fmt: skip
    labels = [
        f"{row['shape']}, {row['heads']}: {row['split']} over {row['devices']}, {row['scaling']}"
        for row in rows
    ]
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 119)
    axes.axvline(100, color=INK, linewidth=0.8)
    axes.set_title(f"{machine['device']}, {machine['date']}", loc="left", fontsize=11)
    axes.set_xlabel("efficiency, %")
    axes.spines[:].set_visible(False)
    axes.xaxis.grid(True, color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK)
    axes.legend(frameon=False, ncols=len(COLORS), loc="lower right", fontsize=9,
                bbox_to_anchor=(1, 1))  # fmt: skip
