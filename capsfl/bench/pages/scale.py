"""Rounds over hospitals on disk on the page."""

from collections.abc import Iterator
from typing import Any

from capsfl.bench.pages.cells import mebibytes, milliseconds, number
from capsfl.bench.pages.section import Section, Table

READING = """One round over hospitals that lie on disk: 16 records each, one local step of the 30,074-weight
network, chunks of L hospitals. Every point runs in a process of its own, which first runs two rounds, gives freed
memory back and then starts its peak anew; so no compilation is in it. Wall and CPU are medians over the rounds after
that. Temporary memory is what XLA plans for the round beyond its arguments and results."""

NUMBERS = frozenset(
    {"hospitals", "cohort", "wall ms", "CPU ms", "temp MiB", "peak MiB", "opened ms", "temporary", "peak"}
)


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The tables of one result."""
    yield Table(
        f"Seconds and memory of a round, L = {result['chunk']}",
        ("hospitals", "cohort", "wall ms", "CPU ms", "temp MiB", "peak MiB", "opened ms"),
        [
            (
                f"{row['population']:,}",
                f"{row['cohort']:,}",
                milliseconds(row["wall_s"]),
                milliseconds(row["process_cpu_s"]),
                mebibytes(row["temporary_bytes"]),
                mebibytes(row["peak_bytes"]),
                f"{1e3 * row['opened_s']:.0f}",
            )
            for row in result["rows"]
        ],
    )
    yield Table(
        "Largest over smallest",
        ("along", "points", "at", "temporary", "peak", "flat within 10 %"),
        [
            (
                along,
                ", ".join(f"{point:,}" for point in found["points"]),
                f"{fixed} {found[fixed]:,}",
                number(found["temporary_bytes"], "{:.3f}"),
                number(found["peak_bytes"], "{:.3f}"),
                "yes" if found["flat"] else "NO",
            )
            for along, fixed in (("cohort", "population"), ("population", "cohort"))
            for found in (result["flatness"][along],)
        ],
    )


SECTIONS = {"scale": Section("Rounds over hospitals on disk", READING, tables, NUMBERS)}
