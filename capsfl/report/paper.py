"""The figures of Kumar et al. 2020, and ours, from several runs, sweeps and benchmark results on one page.

`FIGURES` lists them in the paper's order: what each shows, what draws it, and the command that makes what it is drawn
from. A figure that no given result holds is named on the page with that command.
"""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

from markupsafe import Markup

from capsfl.report import comparison, figures
from capsfl.report.drawing import Drawing
from capsfl.report.formats import decimals
from capsfl.report.page import distinct_names, environment, write_whole
from capsfl.report.providers import providers
from capsfl.report.studies import Summary, read_sweep, summarise
from capsfl.report.study import Record, Study, StudyError, number_at, read_study, record_at, text
from capsfl.report.sweep import draw_against_epsilon, words

SEGMENTERS = "segmenters"
"""How the files of `capsfl bench segmenters` begin."""
NETWORKS = {"segcaps": "SegCaps", "unet": "U-Net", "unet++": "U-Net++"}


@dataclass(frozen=True)
class SweepResult:
    """A sweep: its folder, its record and its settings over their seeds."""

    folder: Path
    record: Record
    rows: Sequence[Summary] = field(repr=False)


@dataclass(frozen=True)
class SegmentersResult:
    """What `capsfl bench segmenters` wrote: its file, what is in it, and the picture beside it where there is one."""

    path: Path
    record: Record
    picture: bytes | None = field(repr=False)


Result: TypeAlias = Study | SweepResult | SegmentersResult


class Figure(NamedTuple):
    """One figure of the page.

    Attributes:
        number: as the paper counts it; `Ours` for those it lacks.
        title: what it is.
        shows: one sentence.
        command: what makes a result that it can be drawn from.
        draw: its drawings of a result; none where the result does not hold it.
    """

    number: str
    title: str
    shows: str
    command: str
    draw: Callable[[Result], Sequence[Drawing]]


def build_figures_page(places: Sequence[Path], out: Path) -> tuple[Path, tuple[Figure, ...]]:
    """Write one self-contained page with every figure that the results at `places` hold.

    Args:
        places: folders that `capsfl train` or `capsfl sweep` wrote, files of `capsfl bench segmenters`, or folders of
            such files.
        out: the page.

    Returns:
        The page, and the figures that it lacks.

    Raises:
        StudyError: a place that is none of these, or one of its files is damaged.
    """
    results = [result for place in places for result in read_results(place)]
    rows, missing = [], []
    for order, figure in enumerate(FIGURES, start=1):
        drawn = [
            {
                "drawing": drawing,
                "name": name_of(result),
                "title": drawing.title if len(drawings) > 1 else "",
                "command": command_of(result) or figure.command,
            }
            for result in results
            for drawings in (figure.draw(result),)
            for drawing in drawings
        ]
        rows.append({"figure": figure, "anchor": f"figure-{order}", "drawn": drawn})
        if not drawn:
            missing.append(figure)
    page = (
        environment()
        .get_template("paper.html.j2")
        .render(
            rows=rows,
            names=[name_of(result) for result in results],
            missing=len(missing),
            light=figures.LIGHT,
            dark=figures.DARK,
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(out, distinct_names(page)), tuple(missing)


def read_results(place: Path) -> list[Result]:
    """What lies at a place.

    Raises:
        StudyError: nothing that a figure could be drawn from.
    """
    if (place / "sweep.json").exists():
        record, rows, _ = read_sweep(place)
        return [SweepResult(place, record, summarise(rows))]
    if (place / "study.json").exists():
        return [read_study(place)]
    files = sorted(place.glob(f"{SEGMENTERS}-*.json")) if place.is_dir() else [place]
    if not files or not all(file.is_file() for file in files):
        raise StudyError(
            f"{place}: no study.json, sweep.json or {SEGMENTERS}-*.json here; name what `capsfl train`, `capsfl sweep` "
            "or `capsfl bench segmenters` wrote"
        )
    return [_read_segmenters(file) for file in files]


def _read_segmenters(path: Path) -> SegmentersResult:
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise StudyError(f"{path}: not JSON ({error}); measure again with `capsfl bench segmenters`") from error
    if not isinstance(record, dict) or not text(record.get("benchmark")).startswith(SEGMENTERS):
        raise StudyError(
            f"{path}: no result of `capsfl bench segmenters`, the only benchmark with a figure of the paper"
        )
    picture = path.with_suffix(".png")
    return SegmentersResult(path, record, picture.read_bytes() if picture.is_file() else None)


def name_of(result: Result) -> str:
    """What the page calls a result."""
    match result:
        case Study():
            return result.name
        case SweepResult():
            return text(result.record.get("name")) or result.folder.name
        case SegmentersResult():
            return result.path.stem


def command_of(result: Result) -> str:
    """The command that made a result, where the result says so."""
    if isinstance(result, SegmentersResult):
        task = text(result.record.get("task"))
        return f"capsfl bench segmenters --task {task} --data DATA" if task else ""
    return text(result.record.get("command"))


def _of_study(draw: Callable[[Study], Sequence[Drawing] | Drawing | None]) -> Callable[[Result], Sequence[Drawing]]:
    """A figure that studies are drawn in."""

    def drawings(result: Result) -> Sequence[Drawing]:
        found = draw(result) if isinstance(result, Study) else None
        return [found] if isinstance(found, Drawing) else found or []

    return drawings


def _providers(place: int) -> Callable[[Result], Sequence[Drawing]]:
    """One of the three charts of a sweep over the number of hospitals."""

    def drawings(result: Result) -> Sequence[Drawing]:
        if not isinstance(result, SweepResult):
            return []
        names = {name: text(result.record.get(name)) for name in ("utility", "scored")}
        found = providers(result.rows, utility=names["utility"] or "utility", scored=names["scored"], words=words)
        return [found["charts"][place]] if found else []

    return drawings


def _frontier(result: Result) -> Sequence[Drawing]:
    if not isinstance(result, SweepResult):
        return []
    found = draw_against_epsilon(result.rows, utility=text(result.record.get("utility")) or "utility")
    return [] if found is None else [found]


def _segmenters(result: Result) -> Sequence[Drawing]:
    """The slices that a benchmark drew, with the scores of all cases in words."""
    if not isinstance(result, SegmentersResult) or result.picture is None:
        return []
    told = []
    for network, scores in record_at(result.record, "summary").items():
        low, high = number_at(scores, "dice", "low"), number_at(scores, "dice", "high")
        interval = "" if low is None or high is None else f" ({decimals(low, 2)} to {decimals(high, 2)})"
        parameters = number_at(result.record, "networks", network, "parameters")
        size = "" if parameters is None else f" with {parameters:,.0f} parameters"
        told.append(
            f"{NETWORKS.get(network, network)} {decimals(number_at(scores, 'dice', 'mean'), 2)}{interval}{size}"
        )
    image = base64.b64encode(result.picture).decode()
    task = text(result.record.get("task"))
    return [
        Drawing(
            f"{task[:1].upper()}{task[1:]}",
            Markup(
                '<img class="panels" alt="Scan, truth and masks side by side" src="data:image/png;base64,{}">'
            ).format(image),
            "Scan, truth, and what each network marks with the truth: truth blue, prediction orange, in slices chosen "
            f"by the truth alone. Mean Dice over cases and seeds: {'; '.join(told)}.",
        )
    ]


SITES = "capsfl train configs/sites.toml"
PROVIDERS = "capsfl sweep configs/providers.toml"

FIGURES = (
    Figure(
        "Figure 8",
        "Sensitivity over rounds",
        "How fast each training comes to find the diseased.",
        SITES,
        _of_study(comparison.sensitivity_over_rounds),
    ),
    Figure(
        "Figure 9",
        "Accuracy of local, pooled and federated training",
        "What a hospital gains from training with others, and what is lost against having all records in one place.",
        SITES,
        _of_study(comparison.accuracy_by_training),
    ),
    Figure(
        "Figure 10",
        "Segmentation side by side",
        "What SegCaps, U-Net and U-Net++ mark on the same slices, beside the scan and the truth.",
        "capsfl bench segmenters --task lungs --data DATA",
        _segmenters,
    ),
    Figure(
        "Figure 11",
        "Accuracy against the number of providers",
        "What another hospital with patients of its own adds.",
        PROVIDERS,
        _providers(0),
    ),
    Figure(
        "Figure 12",
        "Loss against the number of providers",
        "How well the model fits the records it is trained on as hospitals join.",
        PROVIDERS,
        _providers(1),
    ),
    Figure(
        "Figure 13",
        "Run time against the number of providers",
        "What a round costs as hospitals join.",
        PROVIDERS,
        _providers(2),
    ),
    Figure(
        "Ours",
        "Privacy against utility",
        "What can be had within each privacy budget.",
        "capsfl sweep configs/sweep_privacy.toml",
        _frontier,
    ),
    Figure(
        "Ours",
        "From site to site",
        "How the model that each hospital trains alone does at the others.",
        SITES,
        _of_study(comparison.from_site_to_site),
    ),
    Figure(
        "Ours",
        "Leaving one hospital out",
        "What a hospital can expect of a federation that it is no part of.",
        SITES,
        _of_study(comparison.left_out),
    ),
)
"""The figures, in the order of the page."""
