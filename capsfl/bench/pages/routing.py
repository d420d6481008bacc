"""Capsule operators on the page."""

from collections.abc import Iterator
from typing import Any

from capsfl.bench.pages.cells import mebibytes, milliseconds, number, seconds
from capsfl.bench.pages.section import Section, Table, skipped

READING = """Medians of runs in turns, implementations alternated in one sitting. CPU is the time of all threads of the
process; it suffers less than wall time from whatever else the machine does. Temporary memory is what XLA plans
beyond arguments and results; for torch it is how far the process grew. `of roof` is the part of the device's own
rates (below) that a run reaches: the larger of its counted bytes over the copy rate and its counted operations
over the matrix product's, over its wall time. The counts are those in `capsfl/bench/work.py`. Products are of
float32, without TensorFloat-32 on a GPU. There a sample is the mean of runs queued to fill 20 ms, torch's memory is
the card's, and stored votes may pass 100 %: the counted bytes are those of separate operations, of which XLA fuses some
and the card's cache holds others."""

NUMBERS = frozenset({"wall ms", "CPU ms", "temp MiB", "compile s", "of roof", "CPU", "wall", "temporary"})


def describe_roofs(result: dict[str, Any]) -> str:
    """The measured rates of the device, in a line."""
    roofs = result["roofs"]
    return (
        f"Roofs measured in the same sitting: copy {roofs['copy_bytes_per_s'] / 1e9:.1f} GB/s, float32 matrix product "
        f"{roofs['gemm_flops_per_s'] / 1e9:.1f} GFLOP/s."
    )


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The tables of one result."""
    columns = ("case", "pass", "implementation", "wall ms", "CPU ms", "temp MiB", "compile s", "of roof")
    ratios = {_key(row): row for row in result["against_stored_votes"]}
    for operator in dict.fromkeys(row["operator"] for row in result["rows"]):
        found = [row for row in result["rows"] if row["operator"] == operator]
        cases = "; ".join(f"{name}: {text}" for name, text in {r["case"]: r["description"] for r in found}.items())
        yield Table(
            f"{operator} ({cases})",
            columns,
            [
                (
                    row["case"],
                    _short(row["pass"]),
                    row["implementation"],
                    milliseconds(row["wall_s"]),
                    milliseconds(row["process_cpu_s"]),
                    mebibytes(row["temporary_bytes"]),
                    seconds(row["lower_s"], row["compile_s"]),
                    number(row["of_roof"], "{:.0%}"),
                )
                for row in found
            ],
        )
        compared = [ratios[_key(row)] for row in found if _key(row) in ratios]
        yield Table(
            f"{operator} against stored votes",
            ("case", "pass", "implementation", "CPU", "wall", "temporary"),
            [
                (
                    row["case"],
                    _short(row["pass"]),
                    row["implementation"],
                    *(number(row[name], "{:.2f}x") for name in ("process_cpu", "wall", "temporary")),
                )
                for row in compared
            ],
        )
    yield from skipped(result)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["operator"], row["case"], row["pass"], row["implementation"]


def _short(passes: str) -> str:
    return {"forward": "fwd", "forward + backward": "fwd+bwd"}[passes]


SECTIONS = {"routing": Section("Capsule operators", READING, tables, NUMBERS)}
