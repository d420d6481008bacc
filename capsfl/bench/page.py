"""Results as a page of Markdown, and as tables for a terminal."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HEAD = """# Benchmarks

Generated from the JSON in `results/` by `python -m benchmarks.routing --table`. Measure with `capsfl bench routing`
and `capsfl bench segcaps`, or from a checkout that has jax and numpy alone with `python -m benchmarks.routing`.
"""

READING = """Medians of runs in turns, implementations alternated in one sitting. CPU is the time of all threads of the
process; it suffers less than wall time from whatever else the machine does. Temporary memory is what XLA plans
beyond arguments and results; for torch it is how far the process grew. `of roof` is the part of the device's own
rates (below) that a run reaches: the larger of its counted bytes over the copy rate and its counted operations
over the matrix product's, over its wall time. The counts are those in `capsfl/bench/work.py`."""


# Columns of numbers, which stand at the right.
NUMBERS = {"wall ms", "CPU ms", "temp MiB", "compile s", "of roof", "CPU", "wall", "temporary", "devices"}


class Table(NamedTuple):
    """Title, names of columns and rows of words."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def write_page(folder: Path) -> str:
    """One page of Markdown from every result in a folder."""
    parts = [HEAD]
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        place = result["machine"]
        parts.append(f"## {_TITLES[result['benchmark']]}, {_name_device(place)}\n")
        parts.append(f"{describe_machine(place)}\n")
        if result["quick"]:
            parts.append("**A quick run: small shapes, few runs. It shows that everything works, not how fast.**\n")
        if result["benchmark"] == "routing":
            parts.append(f"{READING}\n\n{describe_roofs(result)}\n")
            picture = folder / f"roofline-{path.stem}.png"
            if picture.exists():
                parts.append(f"![Roofline of {path.stem}]({folder.name}/{picture.name})\n")
        else:
            parts.append(f"{SEGCAPS_READING}\n")
        for table in tables(result):
            parts.append(f"### {table.title}\n\n{format_markdown(table)}\n")
    return "\n".join(parts)


SEGCAPS_READING = """Loss and gradient of every parameter for one image of SegCaps R3 with its reconstruction head,
float32. The gradient's difference is the largest of any array, relative to the norm of that array with stored votes."""

_TITLES = {"routing": "Capsule operators", "segcaps": "SegCaps, one training step"}


def tables(result: dict[str, Any]) -> list[Table]:
    """The tables of one result."""
    return list(_routing(result) if result["benchmark"] == "routing" else _segcaps(result))


def describe_machine(place: dict[str, Any]) -> str:
    """What a result was measured on, in a line."""
    versions = ", ".join(f"{name} {value}" for name, value in place["versions"].items())
    driver = f", driver {place['driver']}" if place["driver"] else ""
    note = f" {place['note'][0].upper()}{place['note'][1:]}." if place["note"] else ""
    return (
        f"{place['devices']} x {place['device']}{driver}; {place['cpu_model']}, {place['cores']} cores, "
        f"{place['memory_bytes'] / 2**30:.0f} GiB; {versions}; {place['date']}.{note}"
    )


def describe_roofs(result: dict[str, Any]) -> str:
    """The measured rates of the device, in a line."""
    roofs = result["roofs"]
    return (
        f"Roofs measured in the same sitting: copy {roofs['copy_bytes_per_s'] / 1e9:.1f} GB/s, float32 matrix product "
        f"{roofs['gemm_flops_per_s'] / 1e9:.1f} GFLOP/s."
    )


def _routing(result: dict[str, Any]) -> Iterator[Table]:
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
                    _milliseconds(row["wall_s"]),
                    _milliseconds(row["process_cpu_s"]),
                    _mebibytes(row["temporary_bytes"]),
                    _seconds(row["lower_s"], row["compile_s"]),
                    _number(row["of_roof"], "{:.0%}"),
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
                    *(_number(row[name], "{:.2f}x") for name in ("process_cpu", "wall", "temporary")),
                )
                for row in compared
            ],
        )
    yield from _skipped(result)


def _segcaps(result: dict[str, Any]) -> Iterator[Table]:
    yield Table(
        "One image, forward + backward",
        ("pixels", "implementation", "wall ms", "CPU ms", "temp MiB", "compile s", "gradient differs by"),
        [
            (
                f"{row['size']} x {row['size']}",
                row["implementation"],
                _milliseconds(row["wall_s"]),
                _milliseconds(row["process_cpu_s"]),
                _mebibytes(row["temporary_bytes"]),
                _seconds(row["lower_s"], row["compile_s"]),
                _number(row.get("gradient_difference"), "{:.1e}"),
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
                *(_number(row[name], "{:.2f}x") for name in ("process_cpu", "wall", "temporary")),
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
    yield from _skipped(result)


def _skipped(result: dict[str, Any]) -> Iterator[Table]:
    places: dict[tuple[str, str], list[str]] = {}
    for row in result["skipped"]:
        case = " ".join(str(row[key]) for key in ("operator", "case", "size") if key in row)
        where = places.setdefault((row["implementation"], row["reason"]), [])
        if case not in where:
            where.append(case)
    if places:
        rows = [(name, ", ".join(where), reason) for (name, reason), where in places.items()]
        yield Table("Skipped", ("implementation", "where", "reason"), rows)


def format_markdown(table: Table) -> str:
    """A table as Markdown, without its title."""
    rule = ["---:" if name in NUMBERS else "---" for name in table.columns]
    return "\n".join(_line(words) for words in (table.columns, rule, *table.rows))


def _line(words: Sequence[str]) -> str:
    return f"| {' | '.join(word.replace('|', '/') for word in words)} |"


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["operator"], row["case"], row["pass"], row["implementation"]


def _name_device(place: dict[str, Any]) -> str:
    return place["cpu_model"] if place["platform"] == "cpu" else place["device"]


def _short(passes: str) -> str:
    return {"forward": "fwd", "forward + backward": "fwd+bwd"}[passes]


def _milliseconds(value: dict[str, float] | None) -> str:
    if value is None:
        return "-"
    milliseconds = 1e3 * value["median"]
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}" if value > 10 << 20 else f"{value / 2**20:.1f}"


def _seconds(lower_s: float | None, compile_s: float | None) -> str:
    return "-" if compile_s is None else f"{(lower_s or 0) + compile_s:.1f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
