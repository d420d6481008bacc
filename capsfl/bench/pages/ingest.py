"""From DICOM to standard volumes on the page."""

from collections.abc import Iterator
from typing import Any

from capsfl.bench.pages.cells import mebibytes, milliseconds, number
from capsfl.bench.pages.section import Section, Table, skipped

READING = """DICOM series to the 256 x 256 x 256 voxels of `half`. Each contestant runs in as many processes as
there are cores, one thread and one series each, the way collections are ingested; contestants take turns. Slices a
second are those of all processes, wall and CPU those of a series. Ours is the whole of `capsfl ingest`: lungs and body
sought, one antialiased Lanczos pass an axis, compressed, checksummed, written. MONAI is LoadImage, Orientation, Spacing
(bilinear) and ScaleIntensityRange in float32; SimpleITK its series reader, orientation, one linear resampling and the
window; antialiased, it smooths by a Gaussian first. None of these writes. Peak memory is what a process grew by in its
first run after one on eight slices, which loads what is loaded late."""

NUMBERS = frozenset(
    {"wall ms", "CPU ms", "slices a second", "slices a CPU second", "peak MiB", "wall", "CPU", "memory"}
)


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The tables of one result."""
    for series in dict.fromkeys(row["series"] for row in result["rows"]):
        found = [row for row in result["rows"] if row["series"] == series]
        yield Table(
            f"{series}: {found[0]['slices']} slices of {found[0]['matrix']} x {found[0]['matrix']}, "
            f"{result['cores']} cores",
            ("implementation", "wall ms", "CPU ms", "slices a second", "slices a CPU second", "peak MiB"),
            [
                (
                    f"{row['implementation']} {row['version']}",
                    milliseconds(row["wall_s"]),
                    milliseconds(row["process_cpu_s"]),
                    f"{result['cores'] * row['slices'] / row['wall_s']['median']:.0f}",
                    f"{row['slices'] / row['process_cpu_s']['median']:.0f}",
                    mebibytes(row["peak_bytes"]),
                )
                for row in found
            ],
        )
    yield Table(
        "Against capsfl",
        ("series", "implementation", "wall", "CPU", "memory"),
        [
            (
                row["series"],
                row["implementation"],
                *(number(row[name], "{:.2f}x") for name in ("wall", "process_cpu", "peak")),
            )
            for row in result["against_ours"]
        ],
    )
    yield from skipped(result)


SECTIONS = {"ingest": Section("DICOM series to standard volumes", READING, tables, NUMBERS)}
