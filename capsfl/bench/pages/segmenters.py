"""Segmenters side by side on the page."""

from collections.abc import Iterator
from typing import Any

from capsfl.bench.pages.cells import mebibytes, number
from capsfl.bench.pages.section import Section, Table

READING = """`segcaps` is SegCaps with `norm = "length"`: capsules are divided by their root mean square length before
they vote, and kernels start at votes of unit length; `segcaps-published` is without. The same patches in the same
order, changed alike, for as many steps of Adam; the peak step size was given or, where a table says what was tried,
is the best of the same few for every network, trained on a part of the training patches and scored on the rest; the
weights after the last step are scored on cases never trained on. Dice, HD95 and the absolute volume error are means
over cases and seeds, in brackets where the mean over further seeds and cases lies with probability .95: Student's t on
the variance of seeds plus that of cases, so that three volumes give wide intervals. An empty mask lies the diagonal of
the case away from one that marks something.
`temp MiB` is what XLA plans for a training step beyond weights, moments and results. Seconds are the processor's,
compilation left out. The last row of the first table needs no network. The outlines, where there is a picture, are
those of the first seed: truth blue, prediction orange; nothing but the size of the truth chose the slices."""

LUNGS_READING = f"""{READING}
Masks are fused from three planes, the mean above 2/3, in the grid of the scan."""
TUMOURS_READING = f"""{READING}
Patches of one patient are not independent, and which belong together is not
recorded, so intervals are narrower than patients would give. Every tumour lies in the middle of its patch, which all
rows make use of; an empty patch scores 1 where nothing is marked, else 0. A patch counts as a slice of 2 mm."""

NUMBERS = frozenset(
    (
        *("Dice", "Dice axial alone", "HD95 mm", "volume error ml", "bias ml"),
        *("parameters", "step size", "temp MiB", "step CPU ms", "train CPU s", "case CPU s"),
        *("chosen", "parameters of theirs over ours", "difference in Dice"),
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
        ("network", "parameters", "step size", "temp MiB", "step CPU ms", "train CPU s", "case CPU s"),
        [
            (
                name,
                f"{facts['parameters']:,}",
                ", ".join(f"{rate:g}" for rate in _rates(facts)),
                mebibytes(facts["temporary_bytes"]),
                f"{1e3 * _mean(found[name], 'train_cpu_s') / training['steps']:.0f}",
                f"{_mean(found[name], 'train_cpu_s'):.0f}",
                f"{_mean(found[name], 'mark_cpu_s'):.3g}",
            )
            for name, facts in result["networks"].items()
        ],
    )
    if result["trial_steps"]:
        yield Table(
            f"Step sizes tried for {result['trial_steps']} steps",
            ("network", "fold", "Dice held back", "chosen"),
            [
                (name, fold, ", ".join(_trial(trial) for trial in choice["trials"]), f"{choice['learning_rate']:g}")
                for name, facts in result["networks"].items()
                for fold, choice in facts["choice"].items()
            ],
        )
    if not result["against"]:
        return
    goal = result["goal"]
    told = "" if goal is None else _goal(goal)
    yield Table(
        f"{result['ours']} against the others, case by case{told}",
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


def _rates(facts: dict[str, Any]) -> list[float]:
    """The step sizes of all folds, each once."""
    return sorted({choice["learning_rate"] for choice in facts["choice"].values()})


def _trial(trial: dict[str, Any]) -> str:
    return f"{trial['dice']:.3f} at {trial['learning_rate']:g}"


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
