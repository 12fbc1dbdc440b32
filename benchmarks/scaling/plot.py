"""The picture of a report: what each series does of what so many devices could."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.plot import FAINT, INK

COLORS = {"compressed": "#9aa7b0", "step": "#4c8c2b"}


def draw(reports: list[dict[str, Any]], path: str) -> None:
    """Draws a panel for each report, with the efficiency of both parts on several devices."""
    plt.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK})
    rows = [[r for r in report["series"] if r["devices"] > 1] for report in reports]
    heights = [len(of_report) for of_report in rows]
    figure, panels = plt.subplots(
        len(reports), 1, figsize=(9, 0.9 * len(reports) + 0.2 * sum(heights)),
        layout="constrained", squeeze=False, height_ratios=heights,
    )  # fmt: skip
    for axes, report, of_report in zip(panels[:, 0], reports, rows, strict=True):
        _draw_panel(axes, report["machine"], of_report)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_panel(axes: Any, machine: dict[str, str], rows: list[dict[str, Any]]) -> None:
    labels = [_label(row) for row in rows]
    places = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    for i, (part, color) in enumerate(COLORS.items()):
        mine = [
            (places[label] + 0.4 * i - 0.2, 100 * row["efficiency"])
            for label, row in zip(labels, rows, strict=True)
            if row["part"] == part
        ]
        axes.barh(*zip(*mine, strict=True), 0.36, color=color, label=part)
        for place, value in mine:
            axes.annotate(
                f"{value:.0f}", (value, place), (3, 0), textcoords="offset points", va="center",
                fontsize=8, color=color,
            )  # fmt: skip
    axes.set_yticks(list(places.values()), list(places), fontsize=8)
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.axvline(100, color=INK, linewidth=0.8)
    axes.set_title(f"{machine['device']}, {machine['date']}", loc="left", fontsize=11)
    axes.set_xlabel("efficiency, %")
    axes.spines[:].set_visible(False)
    axes.xaxis.grid(True, color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK)
    axes.legend(frameon=False, ncols=len(COLORS), loc="lower right", fontsize=9,
                bbox_to_anchor=(1, 1))  # fmt: skip


def _label(row: dict[str, Any]) -> str:
    step = f"{row['shape']}, {row['heads']}"
    return f"{step}: {row['split']} over {row['devices']}, {row['scaling']}"
