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
NUMBERS |= {"slices", "slices a second", "slices a CPU second", "memory"}
NUMBERS |= {"wall s", "CPU s", "training s", "training CPU s", "training", "training CPU"}
NUMBERS |= {"weights", "test", "distorted", "seed"}
NUMBERS |= {"parameters", "Dice", "HD95 mm", "volume error ml", "bias ml", "Dice axial alone", "train CPU s"}
NUMBERS |= {
    "step size",
    "step CPU ms",
    "step wall ms",
    "case CPU s",
    "parameters of theirs over ours",
    "difference in Dice",
}


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
        picture = folder / f"{path.stem}.png"
        if picture.exists():
            parts.append(f"![Slices of {path.stem}]({folder.name}/{picture.name})\n")
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
checked, a minute of CPU. The path is the audit path of the last block: 32 bytes a level. Beside a training, a record
takes the digests of the weights (and of every hospital's update, where members decide), signatures and two syncs to
disk; overhead is the median, over rounds with and without in turns, of what the wall time of a round grows by."""

GEYER_READING = """MNIST, sorted by digit and cut into two shards a hospital, after Geyer, Klein & Nabi 2017. Noise is
solved for, so that all rounds together cost epsilon under the relation that goes with the sampling: adding or removing
one hospital for Poisson, replacing one for fixed. `fixed, replace one` is what the row's noise would cost under fixed
sampling. Accuracy is on the 10,000 test images: median over seeds, smallest and largest. At 10,000 hospitals each
holds six images."""

MNIST_READING = """Error on the 10,000 test images after the last epoch, never on a better one before it. Weights are
those outside the decoder, which only training sees. Seconds are those of training, compilation included."""
AFFINE_READING = """Trained on digits at a random place of a black canvas of 40 x 40 pixels, scored on test digits so
placed and on the same ones turned (to 20 degrees), sheared (to 0.2) and scaled (0.8 to 1.2 along each axis), the
ranges of affNIST. The convolutional network has the same four convolutions and as many weights."""

INGEST_READING = """DICOM series to the 256 x 256 x 256 voxels of `half`. Each contestant runs in as many processes as
there are cores, one thread and one series each, the way collections are ingested; contestants take turns. Slices a
second are those of all processes, wall and CPU those of a series. Ours is the whole of `capsfl ingest`: lungs and body
sought, one antialiased Lanczos pass an axis, compressed, checksummed, written. MONAI is LoadImage, Orientation, Spacing
(bilinear) and ScaleIntensityRange in float32; SimpleITK its series reader, orientation, one linear resampling and the
window; antialiased, it smooths by a Gaussian first. None of these writes. Peak memory is what a process grew by in its
first run after one on eight slices, which loads what is loaded late."""

SEGMENTERS_READING = """The same patches in the same order, changed alike, for as many steps of Adam, each network with
the peak step size below; the weights after the last step are scored on cases never trained on. Dice, HD95 and the
absolute volume error are means over cases and seeds, in brackets where the mean over further seeds and cases lies with
probability .95: Student's t on the variance of seeds plus that of cases, so that three volumes give wide intervals. An
empty mask lies the diagonal of the case away from one that marks something. `temp MiB` is what XLA plans for a training
step beyond weights, moments and results. Steps and cases leave compilation out. The last row of the first table needs
no network. The outlines are those of the first seed: truth blue, prediction orange; nothing but the size of the truth
chose the slices."""
LUNGS_READING = f"{SEGMENTERS_READING} Masks are fused from three planes, the mean above 2/3, in the grid of the scan."
TUMOURS_READING = f"""{SEGMENTERS_READING} Patches of one patient are not independent, and which belong together is not
recorded, so intervals are narrower than patients would give. Every tumour lies in the middle of its patch, which all
rows make use of; an empty patch scores 1 where nothing is marked, else 0. A patch counts as a slice of 2 mm."""

_TITLES = {
    "rounds": "One federated round of 100 hospitals",
    "rounds-segcaps": "One federated round, SegCaps",
    "rounds-capsnet": "One federated round, CapsNet",
    "geyer": "Accuracy at a given epsilon",
    "ingest": "DICOM series to standard volumes",
    "ledger": "The ledger",
    "mnist-capsnet": "CapsNet on MNIST",
    "mnist-efficient_capsnet": "Efficient-CapsNet on MNIST",
    "mnist-affine-capsnet": "CapsNet on distorted digits",
    "mnist-affine-efficient_capsnet": "Efficient-CapsNet on distorted digits",
    "routing": "Capsule operators",
    "segcaps": "SegCaps, one training step",
    "segmenters-lungs": "SegCaps, U-Net and U-Net++ on lungs",
    "segmenters-tumours": "SegCaps, U-Net and U-Net++ on lung tumours",
    "scale": "Rounds over hospitals on disk",
    "sweep": "A sweep as one program",
}
_READINGS = {
    "geyer": GEYER_READING,
    "ingest": INGEST_READING,
    "ledger": LEDGER_READING,
    "routing": READING,
    "segcaps": SEGCAPS_READING,
    "segmenters-lungs": LUNGS_READING,
    "segmenters-tumours": TUMOURS_READING,
    "scale": SCALE_READING,
    "sweep": SWEEP_READING,
}
MNIST = ("mnist-capsnet", "mnist-efficient_capsnet")
AFFINE = ("mnist-affine-capsnet", "mnist-affine-efficient_capsnet")
_READINGS |= dict.fromkeys(MNIST, MNIST_READING) | dict.fromkeys(AFFINE, AFFINE_READING)
_READINGS |= dict.fromkeys(("rounds", "rounds-segcaps", "rounds-capsnet"), ROUNDS_READING)


def tables(result: dict[str, Any]) -> list[Table]:
    """The tables of one result."""
    found = {"routing": _routing, "segcaps": _segcaps, "scale": _scale, "sweep": _sweep, "geyer": _geyer}
    found |= {"ledger": _ledger, "ingest": _ingest}
    found |= dict.fromkeys(("segmenters-lungs", "segmenters-tumours"), _segmenters)
    found |= dict.fromkeys((*MNIST, *AFFINE), _mnist)
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
    yield Table(
        "SegCaps over eight hospitals, each round recorded while the next one computes",
        ("decided by", "weights", "rounds", "round s", "with its record s", "overhead", "record ms", "record CPU ms"),
        [
            (
                row["decided"],
                f"{row['parameters']:,}",
                str(row["rounds"]),
                f"{row['round_wall_s']:.3g}",
                f"{row['recorded_round_wall_s']:.3g}",
                f"{row['overhead']:+.1%}",
                f"{1e3 * row['record_wall_s']:.3g}",
                f"{1e3 * row['record_cpu_s']:.3g}",
            )
            for row in result.get("overhead", ())
        ],
    )


def _ingest(result: dict[str, Any]) -> Iterator[Table]:
    for series in dict.fromkeys(row["series"] for row in result["rows"]):
        found = [row for row in result["rows"] if row["series"] == series]
        yield Table(
            f"{series}: {found[0]['slices']} slices of {found[0]['matrix']} x {found[0]['matrix']}, "
            f"{result['cores']} cores",
            ("implementation", "wall ms", "CPU ms", "slices a second", "slices a CPU second", "peak MiB"),
            [
                (
                    f"{row['implementation']} {row['version']}",
                    _milliseconds(row["wall_s"]),
                    _milliseconds(row["process_cpu_s"]),
                    f"{result['cores'] * row['slices'] / row['wall_s']['median']:.0f}",
                    f"{row['slices'] / row['process_cpu_s']['median']:.0f}",
                    _mebibytes(row["peak_bytes"]),
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
                *(_number(row[name], "{:.2f}x") for name in ("wall", "process_cpu", "peak")),
            )
            for row in result["against_ours"]
        ],
    )
    yield from _skipped(result)


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


def _mnist(result: dict[str, Any]) -> Iterator[Table]:
    parts = list(result["rows"][0]["error_percent"])
    goal = "" if result["goal_percent"] is None else f", goal {result['goal_percent']:g} %"
    yield Table(
        f"Error in percent after {result['config']['training']['epochs']} epochs{goal}",
        ("network", "weights", "seed", *parts, "wall s", "CPU s"),
        [
            (
                row["network"],
                f"{row['weights']:,}",
                str(row["seed"]),
                *(f"{row['error_percent'][part]:.2f}" for part in parts),
                f"{row['seconds']:.0f}",
                f"{row['cpu_seconds']:.0f}",
            )
            for row in result["rows"]
        ]
        + [
            (name, "", "mean", *(f"{figures[part]:.2f}" for part in parts), "", "")
            for name, figures in result["summary"].items()
        ],
    )


def _segmenters(result: dict[str, Any]) -> Iterator[Table]:
    training = result["training"]
    found = {name: [row for row in result["rows"] if row["network"] == name] for name in result["summary"]}
    yield Table(
        f"{len(result['cases'])} cases, {len(result['seeds'])} seeds, {training['steps']} steps of "
        f"{training['batch_size']} patches of {result['crop']} x {result['crop']}, published widths x "
        f"{result['width']:g}",
        ("network", "Dice", "Dice axial alone", "HD95 mm", "volume error ml", "bias ml"),
        [
            _segmenter_scores(name, figures, [value for row in found[name] for value in row["axial_dice"]])
            for name, figures in result["summary"].items()
        ]
        + [_segmenter_scores(result["control"]["name"], result["control"], [])],
    )
    yield Table(
        "What they take",
        (
            *("network", "parameters", "step size", "temp MiB", "step CPU ms", "step wall ms"),
            *("train CPU s", "case CPU s", "compile s"),
        ),
        [
            (
                name,
                f"{facts['parameters']:,}",
                f"{facts['learning_rate']:g}",
                _mebibytes(facts["temporary_bytes"]),
                f"{1e3 * _mean(found[name], 'train_cpu_s') / training['steps']:.0f}",
                f"{1e3 * _mean(found[name], 'train_wall_s') / training['steps']:.0f}",
                f"{_mean(found[name], 'train_cpu_s'):.0f}",
                f"{_mean(found[name], 'mark_cpu_s'):.3g}",
                _seconds(facts.get("lower_s"), facts.get("compile_s")),
            )
            for name, facts in result["networks"].items()
        ],
    )
    if not result["against"]:
        return
    goal = result["goal"]
    told = "" if goal is None else _segmenter_goal(goal)
    yield Table(
        f"segcaps against the others, case by case{told}",
        ("network", "parameters of theirs over ours", "difference in Dice"),
        [
            (row["network"], f"{row['parameter_ratio']:.1f}", _interval(row["difference"], "{:+.3f}"))
            for row in result["against"]
        ],
    )


def _segmenter_scores(name: str, figures: dict[str, Any], axial: list[float]) -> tuple[str, ...]:
    return (
        name,
        _interval(figures["dice"], "{:.3f}"),
        f"{sum(axial) / len(axial):.3f}" if axial else "-",
        _interval(figures["hd95_mm"], "{:.1f}"),
        _interval(figures["absolute_volume_error_ml"], "{:.3g}"),
        f"{figures['volume_error_ml']:+.3g}",
    )


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def _segmenter_goal(goal: dict[str, Any]) -> str:
    answer = "missed" if not goal["met"] else "met, by the whole interval" if goal["shown"] else "met by the mean alone"
    return (
        f"; goal: within {goal['margin']:g} of unet's Dice or above, at 1/{goal['parameter_ratio']:g} of its "
        f"parameters: {answer}"
    )


def _interval(figure: dict[str, float | None], form: str) -> str:
    bounds = [figure["low"], figure["high"]]
    inside = "" if None in bounds else f" ({' to '.join(_number(bound, form) for bound in bounds)})"
    return f"{_number(figure['mean'], form)}{inside}"


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
