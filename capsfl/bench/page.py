"""Results as a page of Markdown, and as tables for a terminal."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HEAD = """# Benchmarks

Generated from the JSON in `results/` by `python -m benchmarks.routing --table`. Measure with `capsfl bench NAME`, the
operators also from a checkout that has jax and numpy alone with `python -m benchmarks.routing`.
"""

READING = """Medians of runs in turns, implementations alternated in one sitting. CPU is the time of all threads of the
process; it suffers less than wall time from whatever else the machine does. Temporary memory is what XLA plans
beyond arguments and results; for torch it is how far the process grew. `of roof` is the part of the device's own
rates (below) that a run reaches: the larger of its counted bytes over the copy rate and its counted operations
over the matrix product's, over its wall time. The counts are those in `capsfl/bench/work.py`."""


# Columns of numbers, which stand at the right.
NUMBERS = {"wall ms", "CPU ms", "temp MiB", "compile s", "of roof", "CPU", "wall", "temporary", "devices"}
NUMBERS |= {"L", "of product", "by CPU", "first round s", "z", "epsilon", "goal", "fixed, replace one"}
NUMBERS |= {"rounds", "signatures", "verified a minute", "round bytes", "path bytes"}
NUMBERS |= {"hospitals", "cohort", "peak MiB", "opened ms", "peak"}
NUMBERS |= {"wall s", "CPU s", "training s", "training CPU s", "training", "training CPU"}


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
        parts.append(f"{_READINGS[result['benchmark']]}\n")
        if result["benchmark"] == "routing":
            parts.append(f"{describe_roofs(result)}\n")
            picture = folder / f"roofline-{path.stem}.png"
            if picture.exists():
                parts.append(f"![Roofline of {path.stem}]({folder.name}/{picture.name})\n")
        for table in tables(result):
            parts.append(f"### {table.title}\n\n{format_markdown(table)}\n")
    return "\n".join(parts)


SEGCAPS_READING = """Loss and gradient of every parameter for one image of SegCaps R3 with its reconstruction head,
float32. The gradient's difference is the largest of any array, relative to the norm of that array with stored votes."""

SCALE_READING = """One round over hospitals that lie on disk: 16 records each, one local step of the 30,074-weight
network, chunks of L hospitals. Every point runs in a process of its own, which first runs two rounds, gives freed
memory back and then starts its peak anew; so no compilation is in it. Wall and CPU are medians over the rounds after
that. Temporary memory is what XLA plans for the round beyond its arguments and results."""

SWEEP_READING = """16 settings with 4 seeds each of a small convolutional network, 10 of 100 hospitals in a round, 30
rounds. Seconds are those of whole processes, from their start to their exit: medians over runs in turns, of the 64
processes one run. Training leaves out the imports and the page. A sweep saves what is not training, so that the gain
shrinks as studies grow."""

ROUNDS_READING = """One round over all hospitals: local steps, clipping to S, noise, the server's step, records at hand.
L is how many hospitals are vmapped at once; `L automatic` is what the engine chose itself. Ratios are over that row.
`of product` is the part of this machine's own rate of float32 matrix products that the counted operations reach, by
wall time and by CPU time; only convolutions and dense layers are counted, once forward and once for every gradient
needed. Flower computes in processes of its own, so that only its wall time is known. Every framework ends three rounds
without noise at the same loss, or is left out."""

LEDGER_READING = """A round's record names 28 tensors and a cohort of eight. Decided by members, it also holds eight
commitments, each countersigned, eight ballots, a decision and eight approvals. CPU is what building, signing and
admitting a block takes, hashing of tensors left out; verified are rounds read back with every signature and rule
checked, a minute of CPU. The path is the audit path of the last block: 32 bytes a level."""

GEYER_READING = """MNIST, sorted by digit and cut into two shards a hospital, after Geyer, Klein & Nabi 2017. Noise is
solved for, so that all rounds together cost epsilon under the relation that goes with the sampling: adding or removing
one hospital for Poisson, replacing one for fixed. `fixed, replace one` is what the row's noise would cost under fixed
sampling. Accuracy is on the 10,000 test images: median over seeds, smallest and largest. At 10,000 hospitals each
holds six images."""

_TITLES = {
    "rounds": "One federated round of 100 hospitals",
    "rounds-segcaps": "One federated round, SegCaps",
    "rounds-capsnet": "One federated round, CapsNet",
    "geyer": "Accuracy at a given epsilon",
    "ledger": "The ledger",
    "routing": "Capsule operators",
    "segcaps": "SegCaps, one training step",
    "scale": "Rounds over hospitals on disk",
    "sweep": "A sweep as one program",
}
_READINGS = {
    "geyer": GEYER_READING,
    "ledger": LEDGER_READING,
    "routing": READING,
    "segcaps": SEGCAPS_READING,
    "scale": SCALE_READING,
    "sweep": SWEEP_READING,
}
_READINGS |= dict.fromkeys(("rounds", "rounds-segcaps", "rounds-capsnet"), ROUNDS_READING)


def tables(result: dict[str, Any]) -> list[Table]:
    """The tables of one result."""
    found = {"routing": _routing, "segcaps": _segcaps, "scale": _scale, "sweep": _sweep, "geyer": _geyer}
    found["ledger"] = _ledger
    found |= dict.fromkeys(("rounds", "rounds-segcaps", "rounds-capsnet"), _rounds)
    return list(found[result["benchmark"]](result))


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


def _scale(result: dict[str, Any]) -> Iterator[Table]:
    yield Table(
        f"Seconds and memory of a round, L = {result['chunk']}",
        ("hospitals", "cohort", "wall ms", "CPU ms", "temp MiB", "peak MiB", "opened ms"),
        [
            (
                f"{row['population']:,}",
                f"{row['cohort']:,}",
                _milliseconds(row["wall_s"]),
                _milliseconds(row["process_cpu_s"]),
                _mebibytes(row["temporary_bytes"]),
                _mebibytes(row["peak_bytes"]),
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
                _number(found["temporary_bytes"], "{:.3f}"),
                _number(found["peak_bytes"], "{:.3f}"),
                "yes" if found["flat"] else "NO",
            )
            for along, fixed in (("cohort", "population"), ("population", "cohort"))
            for found in (result["flatness"][along],)
        ],
    )


def _sweep(result: dict[str, Any]) -> Iterator[Table]:
    yield Table(
        f"{result['studies']} studies",
        ("form", "wall s", "CPU s", "training s", "training CPU s"),
        [
            (
                row["form"],
                *(
                    _number(row.get(name), "{:.1f}")
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
                    _number(found.get(name), "{:.2f}x")
                    for name in ("wall_s", "process_cpu_s", "training_s", "training_cpu_s")
                ),
                _number(result["differences"].get(form), "{:.1e}"),
            )
            for form, found in result["ratios"].items()
        ],
    )


def _ledger(result: dict[str, Any]) -> Iterator[Table]:
    yield Table(
        f"Rounds of {result['members']} hospitals",
        ("decided by", "curve", "rounds", "signatures", "CPU ms", "verified a minute", "round bytes", "path bytes"),
        [
            (
                row["decided"],
                row["curve"],
                f"{row['rounds']:,}",
                f"{row['signatures']:.0f}",
                f"{1e3 * row['record_cpu_s']:.3g}",
                f"{row['verified_per_cpu_minute']:,.0f}",
                f"{row['round_bytes']:,.0f}",
                str(row["path_bytes"]),
            )
            for row in result["rows"]
        ],
    )


def _rounds(result: dict[str, Any]) -> Iterator[Table]:
    counted = result["flops"] is not None
    product = result["product"]["flops_per_s"] / 1e9
    work = f", {result['flops'] / 1e9:.2f} GFLOP; float32 products here run at {product:.0f} GFLOP/s" if counted else ""
    yield Table(
        f"{result['hospitals']} hospitals, {result['parameters']:,} weights{work}",
        ("implementation", "L", "wall ms", "CPU ms", "CPU", "wall", "of product", "by CPU", "first round s"),
        [
            (
                " ".join(filter(None, (row["implementation"], row.get("version")))),
                str(row.get("chunk") or "-"),
                _milliseconds(row["wall_s"]),
                _milliseconds(row["process_cpu_s"]),
                _number(row["cpu_ratio"], "{:.2f}x"),
                _number(row["wall_ratio"], "{:.2f}x"),
                _number(row.get("of_product"), "{:.0%}"),
                _number(row.get("of_product_cpu"), "{:.0%}"),
                _number(row.get("first_round_s"), "{:.1f}"),
            )
            for row in result["rows"]
        ],
    )
    yield from _skipped(result)


def _geyer(result: dict[str, Any]) -> Iterator[Table]:
    yield Table(
        f"Epsilon {result['target_epsilon']:g}",
        (
            "hospitals",
            "cohort",
            "delta",
            "rounds",
            "sampling",
            "z",
            "epsilon",
            "fixed, replace one",
            "accuracy",
            "goal",
        ),
        [
            (
                f"{row['hospitals']:,}",
                str(row["cohort"]),
                f"{row['delta']:g}",
                str(row["rounds"]),
                f"{row['sampler']}, {row['relation'].replace('_', ' ')}",
                f"{row['noise_multiplier']:.3f}",
                f"{row['epsilon']:.2f}",
                _number(row["epsilon_fixed_replace_one"], "{:.1f}"),
                "{median:.3f} ({min:.3f} to {max:.3f})".format(**row["accuracy"]),
                _number(row["goal"], "{:.2f}"),
            )
            for row in result["rows"]
        ],
    )


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
