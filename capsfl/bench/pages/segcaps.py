"""A training step of SegCaps on the page."""

from collections.abc import Iterator
from typing import Any

from capsfl.bench.pages.cells import mebibytes, milliseconds, number, seconds
from capsfl.bench.pages.section import Section, Table, skipped

READING = """Loss and gradient of every parameter for one image of SegCaps R3 with its reconstruction head,
float32. The gradient's difference is the largest of any array, relative to the norm of that array with stored votes."""

NUMBERS = frozenset({"wall ms", "CPU ms", "temp MiB", "compile s", "CPU", "wall", "temporary", "devices"})


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The tables of one result."""
    yield Table(
        "One image, forward + backward",
        ("pixels", "implementation", "wall ms", "CPU ms", "temp MiB", "compile s", "gradient differs by"),
        [
            (
                f"{row['size']} x {row['size']}",
                row["implementation"],
                milliseconds(row["wall_s"]),
                milliseconds(row["process_cpu_s"]),
                mebibytes(row["temporary_bytes"]),
                seconds(row["lower_s"], row["compile_s"]),
                number(row.get("gradient_difference"), "{:.1e}"),
            )
            for row in result["rows"]
        ],
    )
    yield Table(
        "Against stored votes",
        ("pixels", "implementation", "CPU", "wall", "temporary"),
        [
            (
                f"{row['size']} x {row['size']}",
                row["implementation"],
                *(number(row[name], "{:.2f}x") for name in ("process_cpu", "wall", "temporary")),
            )
            for row in result["against_stored_votes"]
        ],
    )
    yield Table(
        "Data-parallel over images and slices, against one device (CPU devices: correctness, not speed)",
        ("form", "devices", "loss differs by", "gradient differs by", "equal within 1e-5"),
        [
            (row["form"], str(row["devices"]), row["reason"], "-", "no")
            if "reason" in row
            else (
                row["form"],
                str(row["devices"]),
                f"{row['loss']:.1e}",
                f"{row['gradient']:.1e}",
                "yes" if row["equal"] else "NO",
            )
            for row in result["parallel"]
        ],
    )
    yield from skipped(result)


SECTIONS = {"segcaps": Section("SegCaps, one training step", READING, tables, NUMBERS)}
