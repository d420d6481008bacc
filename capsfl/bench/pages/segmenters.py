"""Segmenters side by side on the page."""

from collections.abc import Iterator
from typing import Any

from capsfl.bench.pages.cells import mebibytes, number, seconds
from capsfl.bench.pages.section import Section, Table

READING = """The same patches in the same order, changed alike, for as many steps of Adam, each network with
the peak step size below; the weights after the last step are scored on cases never trained on. Dice, HD95 and the
absolute volume error are means over cases and seeds, in brackets where the mean over further seeds and cases lies with
probability .95: Student's t on the variance of seeds plus that of cases, so that three volumes give wide intervals. An
empty mask lies the diagonal of the case away from one that marks something. `temp MiB` is what XLA plans for a training
step beyond weights, moments and results. Steps and cases leave compilation out. The last row of the first table needs
no network. The outlines are those of the first seed: truth blue, prediction orange; nothing but the size of the truth
chose the slices."""

LUNGS_READING = f"{READING} Masks are fused from three planes, the mean above 2/3, in the grid of the scan."
TUMOURS_READING = f"""{READING} Patches of one patient are not independent, and which belong together is not
recorded, so intervals are narrower than patients would give. Every tumour lies in the middle of its patch, which all
rows make use of; an empty patch scores 1 where nothing is marked, else 0. A patch counts as a slice of 2 mm."""

NUMBERS = frozenset(
    (
        *("Dice", "Dice axial alone", "HD95 mm", "volume error ml", "bias ml"),
        *("parameters", "step size", "temp MiB", "step CPU ms", "step wall ms"),
        *("train CPU s", "case CPU s", "compile s"),
        *("parameters of theirs over ours", "difference in Dice"),
    )
)


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The tables of one result."""
    training = result["training"]
    found = {name: [row for row in result["rows"] if row["network"] == name] for name in result["summary"]}
    yield Table(
        f"{len(result['cases'])} cases, {len(result['seeds'])} seeds, {training['steps']} steps of "
        f"{training['batch_size']} patches of {result['crop']} x {result['crop']}, published widths x "
        f"{result['width']:g}",
        ("network", "Dice", "Dice axial alone", "HD95 mm", "volume error ml", "bias ml"),
        [
            _scores(name, figures, [value for row in found[name] for value in row["axial_dice"]])
            for name, figures in result["summary"].items()
        ]
        + [_scores(result["control"]["name"], result["control"], [])],
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
                mebibytes(facts["temporary_bytes"]),
                f"{1e3 * _mean(found[name], 'train_cpu_s') / training['steps']:.0f}",
                f"{1e3 * _mean(found[name], 'train_wall_s') / training['steps']:.0f}",
                f"{_mean(found[name], 'train_cpu_s'):.0f}",
                f"{_mean(found[name], 'mark_cpu_s'):.3g}",
                seconds(facts.get("lower_s"), facts.get("compile_s")),
            )
            for name, facts in result["networks"].items()
        ],
    )
    if not result["against"]:
        return
    goal = result["goal"]
    told = "" if goal is None else _goal(goal)
    yield Table(
        f"segcaps against the others, case by case{told}",
        ("network", "parameters of theirs over ours", "difference in Dice"),
        [
            (row["network"], f"{row['parameter_ratio']:.1f}", _interval(row["difference"], "{:+.3f}"))
            for row in result["against"]
        ],
    )


def _scores(name: str, figures: dict[str, Any], axial: list[float]) -> tuple[str, ...]:
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


def _goal(goal: dict[str, Any]) -> str:
    answer = "missed" if not goal["met"] else "met, by the whole interval" if goal["shown"] else "met by the mean alone"
    return (
        f"; goal: within {goal['margin']:g} of unet's Dice or above, at 1/{goal['parameter_ratio']:g} of its "
        f"parameters: {answer}"
    )


def _interval(figure: dict[str, float | None], form: str) -> str:
    bounds = [figure["low"], figure["high"]]
    inside = "" if None in bounds else f" ({' to '.join(number(bound, form) for bound in bounds)})"
    return f"{number(figure['mean'], form)}{inside}"


SECTIONS = {
    "segmenters-lungs": Section("SegCaps, U-Net and U-Net++ on lungs", LUNGS_READING, tables, NUMBERS),
    "segmenters-tumours": Section("SegCaps, U-Net and U-Net++ on lung tumours", TUMOURS_READING, tables, NUMBERS),
}
