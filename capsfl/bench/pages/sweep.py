"""Sweeps on the page."""

from collections.abc import Iterator
from typing import Any

from capsfl.bench.pages.cells import number
from capsfl.bench.pages.section import Section, Table

READING = """16 settings with 4 seeds each of a small convolutional network, 10 of 100 hospitals in a round, 30
rounds. Seconds are those of whole processes, from their start to their exit: medians over runs in turns, of the 64
processes one run. Training leaves out the imports and the page. A sweep saves what is not training, so that the gain
shrinks as studies grow."""

NUMBERS = frozenset({"wall s", "CPU s", "training s", "training CPU s", "wall", "CPU", "training", "training CPU"})


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The tables of one result."""
    yield Table(
        f"{result['studies']} studies",
        ("form", "wall s", "CPU s", "training s", "training CPU s"),
        [
            (
                row["form"],
                *(
                    number(row.get(name), "{:.1f}")
                    for name in ("wall_s", "process_cpu_s", "training_s", "training_cpu_s")
                ),
            )
            for row in result["rows"]
        ],
    )
    yield Table(
        "Against the sweep",
        ("form", "wall", "CPU", "training", "training CPU", "largest difference of a figure"),
        [
            (
                form,
                *(
                    number(found.get(name), "{:.2f}x")
                    for name in ("wall_s", "process_cpu_s", "training_s", "training_cpu_s")
                ),
                number(result["differences"].get(form), "{:.1e}"),
            )
            for form, found in result["ratios"].items()
        ],
    )


SECTIONS = {"sweep": Section("A sweep as one program", READING, tables, NUMBERS)}
