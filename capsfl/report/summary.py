"""A study in one wide picture for a README: slices, ROC, comparison with the controls, curves per round."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from capsfl.report.figures import LIGHT, MAX_LINES, draw_curves, draw_forest, draw_roc, style
from capsfl.report.overlays import grey_levels, level_of, outline
from capsfl.report.study import Overlay, Study, StudyError, read_overlays, read_study
from capsfl.report.tables import (
    compare,
    estimates,
    hospital_colours,
    metric_series,
    overall_series,
    roc_curves,
)

TRUTH_COLOUR = "#37d0b4"
PREDICTION_COLOUR = "#ff9f40"
METRICS = {"dice": "Dice", "accuracy": "accuracy", "sensitivity": "sensitivity", "loss": "loss"}


def summary_picture(study_folder: Path, out_png: Path) -> Path:
    """Draw a study as one 1600 x 600 PNG.

    Left: up to two slices, each as scan, truth and prediction. Right: ROC, AUC beside the controls, and one
    curve per task. What the study does not have yet is left out.

    Args:
        study_folder: the folder that `capsfl train` wrote.
        out_png: the picture to write.

    Raises:
        StudyError: the folder is no study, or there is nothing in it to draw yet.
    """
    study = read_study(Path(study_folder))
    slices, charts = _slices(study), _charts(study)
    if not slices and not charts:
        raise StudyError(f"{study_folder}: nothing to draw yet; wait for the first round of training")
    with style():
        figure = Figure(figsize=(16, 6), dpi=100, facecolor="white")
        if slices:
            grid = figure.add_gridspec(
                len(slices), 3, left=0.015, right=0.54 if charts else 0.985,
                top=0.92, bottom=0.02, wspace=0.04, hspace=0.06,
            )  # fmt: skip
            for row, overlay in enumerate(slices):
                panels = [figure.add_subplot(grid[row, place]) for place in range(3)]
                _triptych(panels, overlay, titled=row == 0)
        if charts:
            rows, columns = min(2, len(charts)), (len(charts) + 1) // 2
            grid = figure.add_gridspec(
                rows, columns, left=0.59 if slices else 0.05, right=0.965,
                top=0.92, bottom=0.07, wspace=0.42, hspace=0.42,
            )  # fmt: skip
            for place, (title, draw) in enumerate(charts):
                axes = figure.add_subplot(grid[place // columns, place % columns])
                draw(axes)
                axes.set_title(title, fontsize=11)
        FigureCanvasAgg(figure).print_png(out_png, metadata={"Software": None})
    return Path(out_png)


def _slices(study: Study) -> list[Overlay]:
    """The slice with the largest truth, and the one with the largest in another plane, else patient."""
    arm = study.lead("segmentation")
    found = read_overlays(arm, limit=64) if arm else []
    found.sort(key=lambda overlay: 0 if overlay.truth is None else -int(overlay.truth.sum()))
    if not found:
        return []
    first = found[0]
    others = [each for each in found if each.plane != first.plane]
    others = others or [each for each in found if each.patient != first.patient]
    return [first, *others[:1]]


def _charts(study: Study) -> list[tuple[str, Callable[[Axes], None]]]:
    """Titles and painters: ROC, AUC beside the controls, one curve of the primary arm for each task."""
    charts: list[tuple[str, Callable[[Axes], None]]] = []
    lines = [curve for _, _, curve in roc_curves(study)]
    if lines:
        charts.append(("ROC", partial(draw_roc, lines=lines)))
    comparison = compare(study, "classification")
    if comparison:
        rows = estimates(study, comparison)
        charts.append(("AUC beside the controls", partial(draw_forest, rows=rows, reference=0.5)))
    arm = next(arm for arm in study.arms if arm.name == study.primary)
    for task in ("segmentation", "classification"):
        rounds = arm.rounds_of(task)
        for metric, title in METRICS.items():
            if metric_series(rounds, metric) or overall_series(rounds, metric):
                charts.append(
                    (
                        f"{task}, {title} per round",
                        partial(_curves, study=study, rounds=rounds, metric=metric),
                    )
                )
                break
    return charts


def _curves(axes: Axes, *, study: Study, rounds: list, metric: str) -> None:
    series, colours = metric_series(rounds, metric), hospital_colours(study)
    draw_curves(axes, series, colours=colours, overall=overall_series(rounds, metric), unit_interval=metric != "loss")
    for place, name in enumerate(series if len(series) <= MAX_LINES else ()):
        axes.text(
            0.97,
            0.07 + 0.09 * (len(series) - 1 - place),
            name[:16],
            color=LIGHT[colours[name]],
            transform=axes.transAxes,
            horizontalalignment="right",
        )


def _triptych(panels: list[Axes], overlay: Overlay, *, titled: bool) -> None:
    height, width = overlay.hu.shape
    layers = (
        ("scan", []),
        ("truth", [("truth", overlay.truth, TRUTH_COLOUR, "-")]),
        (
            "prediction",
            [
                ("truth", overlay.truth, TRUTH_COLOUR, ":"),
                ("prediction", overlay.prediction, PREDICTION_COLOUR, "-"),
            ],
        ),
    )
    for axes, (title, masks) in zip(panels, layers, strict=True):
        axes.imshow(
            grey_levels(overlay.hu),
            cmap="gray",
            vmin=0,
            vmax=255,
            extent=(0, width, height, 0),
            aspect=overlay.aspect,
        )
        for name, mask, colour, dash in masks:
            for line in [] if mask is None else outline(mask, level_of(name, overlay)):
                axes.plot(line[:, 0], line[:, 1], color=colour, linewidth=1.5, linestyle=dash)
        if titled:
            axes.set_title(title, fontsize=11)
        axes.set_axis_off()
    if overlay.dice is not None:
        panels[2].text(
            0.98,
            0.03,
            f"Dice {overlay.dice:.2f}",
            color="white",
            transform=panels[2].transAxes,
            ha="right",
            fontsize=9,
            bbox={"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 2},
        )
