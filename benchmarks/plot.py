"""The picture for the README: how near to the memory's speed each shape comes."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

INK, FAINT = "#22303c", "#c9d1d6"
COLORS = {"cuda": "#4c8c2b", "cpu": "#0f7c8f", "reference": "#9aa7b0", "torch attention": "#e08e2b"}


def draw(reports: list[dict], path: str) -> None:
    """Draws one panel for each report and operator."""
    reports = [
        report | {"operator": name, "rows": [r for r in report["rows"] if r["operator"] == name]}
        for report in reports
        for name in dict.fromkeys(row["operator"] for row in report["rows"])
    ]
    plt.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK})
    figure, panels = plt.subplots(
        len(reports), 1, figsize=(9, 0.4 + 3.1 * len(reports)), layout="constrained", squeeze=False
    )
    for axes, report in zip(panels[:, 0], reports, strict=True):
        rows = report["rows"]
        names = sorted(
            {n for row in rows for n in row["seconds"] if n in COLORS}, key=list(COLORS).index
        )
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            x = np.arange(len(rows)) + (i - (len(names) - 1) / 2) * width
            share = [
                100 * row["floor_bytes"] / row["read_bandwidth"] / row["seconds"].get(name, np.inf)
                for row in rows
            ]
            axes.bar(x, share, width * 0.92, color=COLORS[name], label=name)
            for at, value in zip(x, share, strict=True):
                if value:
                    text = f"{value:.0f}" if value >= 1 else f"{value:.1f}"
                    axes.annotate(
                        text, (at, value), (0, 2), textcoords="offset points", ha="center",
                        fontsize=8, color=COLORS[name],
                    )  # fmt: skip
        megabytes = [row["floor_bytes"] / 1e6 for row in rows]
        labels = [
            f"{row['shape']}\n{size:.{0 if size >= 10 else 2}f} MB"
            for row, size in zip(rows, megabytes, strict=True)
        ]
        axes.set_xticks(range(len(rows)), labels)
        axes.set_ylim(0, 112)
        axes.axhline(100, color=INK, linewidth=0.8)
        machine = report["machine"]
        axes.set_title(
            f"{report['operator']}: {machine['device']}, {machine['date']}", loc="left", fontsize=11
        )
        axes.set_ylabel("% of read bandwidth")
        axes.spines[:].set_visible(False)
        axes.yaxis.grid(True, color=FAINT, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, colors=INK)
        axes.legend(frameon=False, ncols=len(names), loc="upper left", fontsize=9)
    figure.savefig(path, dpi=150)
