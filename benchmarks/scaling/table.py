"""The tables of a report, in Markdown."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Column = Callable[[Row], str]


def columns(report: dict[str, Any], exchanges: bool) -> dict[str, Column]:
    """What a table tells of each row, by its title; times in microseconds."""

    def floor(row: Row) -> str:
        each = row["floor_bytes"] / row["devices"]
        bandwidth = report["read_bandwidth"]
        return f"{each / 1e6:.1f} MB" + (f", {each / bandwidth * 1e6:.1f}" if bandwidth else "")

    def on_links(row: Row) -> str:
        speed = report["links"][str(row["devices"])]["bytes_per_second"]
        return f"{row['ring_bytes'] / speed * 1e6:.2f}" if "ring_bytes" in row else ""

    def alone(row: Row) -> str:
        return f"{row['exchange_seconds'] * 1e6:.1f}" if "exchange_seconds" in row else ""

    told: dict[str, Column] = {
        "split": lambda row: row["split"],
        "scaling": lambda row: row["scaling"],
        "step": lambda row: f"{row['shape']}, {row['heads']}",
        "devices": lambda row: str(row["devices"]),
        "part": lambda row: row["part"],
        "one device": lambda row: f"{row['one_device_seconds'] * 1e6:.1f}",
        "these devices": lambda row: f"{row['seconds'] * 1e6:.1f}",
        "efficiency": lambda row: f"{row['efficiency']:.2f}",
        "floor of a device": floor,
    }
    if exchanges:
        told |= {
            "collectives": lambda row: by_kind(row["collectives"]),
            "of the links": on_links,
            "alone": alone,
        }
    return told


def by_kind(found: list[Row]) -> str:
    """How many collectives of each kind, and the bytes of these."""
    sizes = collections.defaultdict(list)
    for collective in found:
        sizes[collective["kind"]].append(collective["bytes"])
    return ", ".join(f"{len(s)} {kind}, {sum(s) / 1e3:.1f} kB" for kind, s in sizes.items())


def markdown(report: dict[str, Any]) -> str:
    """A table of the rows on several devices without a collective, and one of those with some."""
    tables = []
    for exchanges in (False, True):
        rows = [
            row for row in report["series"]
            if row["devices"] > 1 and bool(row["collectives"]) == exchanges
        ]  # fmt: skip
        if rows:
            told = columns(report, exchanges)
            lines = [list(told), ["---"] * len(told)]
            lines += [[column(row) for column in told.values()] for row in rows]
            tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables)
