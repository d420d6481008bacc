"""Drawings and numbers: what is drawn is what was given."""

import base64
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from capsfl.report import StudyError, figures, formats, summary_picture
from capsfl.report.figures import DARK, LIGHT, Estimate, RocCurve, Scores
from capsfl.report.matrix import STRONGEST, Cell, Matrix, matrix
from capsfl.report.overlays import grey_levels, outline, triptych
from capsfl.report.spreads import Spread, spreads
from capsfl.report.study import Overlay

CHARTS: dict[str, Callable[[], str]] = {
    "curves": lambda: figures.curves(
        {"A": [(1, 0.9), (2, 0.5)], "B": [(1, 0.8)]}, title="loss", colours={"A": "series-0", "B": "series-1"}
    ),
    "band": lambda: figures.curves(
        {f"H{n}": [(1, n), (2, 2 * n)] for n in range(20)}, title="loss", colours={}, overall=[(1, 9.0)]
    ),
    "empty": lambda: figures.curves({}, title="loss", colours={}),
    "roc": lambda: figures.roc([RocCurve([0, 0.2, 1], [0, 0.9, 1], operating_point=(0.2, 0.9))]),
    "forest": lambda: figures.forest(
        [Estimate("a$x$<b>", 0.81, 0.7, 0.9), Estimate("control", 0.5, colour="muted")], quantity="AUC"
    ),
    "strip": lambda: figures.strip([Scores("A", [0.9, 0.8], [0.1]), Scores("B", [], [])], threshold=0.5),
    "spreads as bars": lambda: spreads(
        {"a": [Spread(1, 0.5, 0.4, 0.6), Spread(16, 0.8)], "b": [Spread(1, 0.5, 0.5, 0.7)]},
        title="accuracy",
        label="hospitals",
        colours={"a": "series-0"},
        doubling=True,
    ),
    "spreads as a band": lambda: spreads(
        {"a": [Spread(n, n / 20, n / 30, n / 20) for n in range(20)]},
        title="sensitivity",
        label="round",
        colours={},
        unit_interval=True,
    ),
    "no spreads": lambda: spreads({}, title="loss", label="hospitals", colours={}, doubling=True),
    "matrix": lambda: matrix(
        Matrix(["A<b>", "all"], ["A<b>", "B"], [[Cell(0.75, 0.6, 0.9), Cell(None)], [Cell(1.0), Cell(0.3)]], apart=1),
        quantity="AUC",
        floor=0.5,
    ),
    "bars": lambda: figures.bars([("stage", [3.0, 4.0])], quantity="seconds", colours=("accent", "negative")),
}


def texts(drawing: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(drawing).iter("text")]


@pytest.mark.parametrize("chart", CHARTS)
def test_a_chart_is_well_formed_themed_and_the_same_every_time(chart: str) -> None:
    drawing = CHARTS[chart]()
    assert ElementTree.fromstring(drawing).tag == "svg"
    assert not re.search(r"#[0-9a-f]{6}\b", drawing), "a colour that the page cannot change"
    assert set(re.findall(r"var\(--([\w-]+)\)", drawing)) <= set(LIGHT)
    assert "font-family" not in drawing
    assert "http" not in drawing
    assert drawing == CHARTS[chart]()


def test_both_themes_name_the_same_colours_and_no_two_of_a_theme_are_equal() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)
    assert len(set(DARK.values())) == len(DARK)


def test_a_forest_prints_names_as_given_and_values_to_three_decimals() -> None:
    assert {"a$x$<b>", "0.810", "control", "0.500"} <= set(texts(CHARTS["forest"]()))


def test_a_dot_of_a_forest_stands_where_its_value_is() -> None:
    drawing = figures.forest([Estimate("a", 0.0), Estimate("b", 0.5), Estimate("c", 1.0)], quantity="AUC")
    dots = [float(node.get("x", "nan")) for node in ElementTree.fromstring(drawing).iter("use")]
    left, middle, right = dots
    assert middle == pytest.approx((left + right) / 2, abs=0.01)
    assert right - left > 100


def test_intervals_go_from_their_low_to_their_high_end_and_doublings_stand_at_equal_distances() -> None:
    drawing = spreads(
        {"a": [Spread(n, 0.5, 0.5 - n / 64, 0.5 + n / 32) for n in (1, 2, 4, 8)]},
        title="accuracy", label="hospitals", colours={}, unit_interval=True, doubling=True,
    )  # fmt: skip
    tree = ElementTree.fromstring(drawing)
    dots = sorted((float(node.get("x", "nan")), float(node.get("y", "nan"))) for node in tree.iter("use"))
    steps = np.diff([x for x, _ in dots])
    assert steps == pytest.approx([steps[0]] * 3, abs=0.01)
    bars = re.findall(r'd="M ([\d.]+) ([\d.]+)\s+L \1 ([\d.]+)\s+"', drawing)
    ends = {float(x): (float(low) - y, y - float(high)) for x, low, high in bars for at, y in dots if at == float(x)}
    below, above = zip(*(ends[x] for x, _ in dots), strict=True)
    assert above == pytest.approx([2 * each for each in below], abs=0.01)
    assert np.asarray(below) / below[0] == pytest.approx([1, 2, 4, 8], rel=0.01)


def test_a_cell_says_its_figure_and_has_the_colour_of_its_height_above_chance() -> None:
    drawing = CHARTS["matrix"]()
    assert {"A<b>", "B", "all", "0.75", "0.60–0.90", "–", "1.00", "0.30"} <= set(texts(drawing))
    strengths = [float(found) for found in re.findall(r"fill: var\(--accent\); opacity: ([\d.]+)", drawing)]
    assert strengths == [STRONGEST / 2, STRONGEST], "below chance, and undefined, have no colour"
    assert drawing.count("stroke: var(--ink); stroke-width: 0.9") == 1, "one hospital at home"


def test_many_hospitals_become_one_band() -> None:
    few = figures.curves({f"H{n}": [(1, n), (2, n)] for n in range(9)}, title="loss", colours={})
    many = figures.curves({f"H{n}": [(1, n), (2, n)] for n in range(900)}, title="loss", colours={})
    assert len(many) < 1.2 * len(few)


def test_grey_levels_are_the_lung_window() -> None:
    # Level -600 HU and width 1600 HU: black at -1400, white at 200.
    hu = np.array([-3000.0, -1400.0, -600.0, 200.0, 3071.0])
    assert grey_levels(hu).tolist() == [0, 0, 128, 255, 255]


def test_an_outline_encloses_its_region_also_at_the_border() -> None:
    mask = np.zeros((40, 60), bool)
    mask[0:20, 0:30] = True
    (line,) = outline(mask)
    x, y = line[:, 0], line[:, 1]
    area = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
    assert area == pytest.approx(20 * 30, rel=0.01)
    assert (x.min(), x.max(), y.min(), y.max()) == (0, 30, 0, 20)


def overlay(*, aspect: float, truth: bool) -> Overlay:
    hu = np.linspace(-1400, 200, 30 * 50, dtype=np.float32).reshape(30, 50)
    mask = np.zeros((30, 50), bool)
    mask[10:20, 10:20] = True
    return Overlay("<P>", "A", "xz", "3", 0.5, hu, mask if truth else None, mask.astype(np.float32), aspect=aspect)


def test_a_triptych_keeps_the_proportions_of_the_tissue_and_embeds_the_scan_once() -> None:
    drawing = ElementTree.fromstring(triptych(overlay(aspect=5.0, truth=True)))
    width, height = (float(value) for value in drawing.get("viewBox", "").split()[2:])
    (image,) = drawing.iter("image")
    assert float(image.get("height", "0")) == height == 30 * 5
    assert 3 * 50 < width < 3.1 * 50
    picture = Image.open(io.BytesIO(base64.b64decode(image.get("href", "").split(",")[1])))
    assert (picture.size, picture.mode) == ((50, 30), "L")
    assert picture.getpixel((0, 0)) == 0
    assert picture.getpixel((49, 29)) == 255
    assert [path.get("class") for path in drawing.iter("path")] == ["truth", "truth faint", "prediction"]


def test_a_prediction_is_outlined_where_it_marks() -> None:
    ramp = np.broadcast_to(np.linspace(0, 1, 50, dtype=np.float32), (30, 50))
    shown = replace(overlay(aspect=1.0, truth=False), prediction=ramp, decision=0.8)
    (path,) = ElementTree.fromstring(triptych(shown)).iter("path")
    columns = [float(x) for x in re.findall(r"[ML]([\d.]+) ", path.get("d", ""))]
    assert min(columns) == pytest.approx(0.8 * 49 + 0.5, abs=0.2)


def test_a_triptych_without_truth_draws_only_the_prediction() -> None:
    drawing = ElementTree.fromstring(triptych(overlay(aspect=1.0, truth=False)))
    assert [path.get("class") for path in drawing.iter("path")] == ["prediction"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (formats.duration(3.42), "3.4 s"),
        (formats.duration(59.7), "60 s"),
        (formats.duration(125), "2 min 05 s"),
        (formats.duration(4321), "1 h 12 min"),
        (formats.size(512), "512 B"),
        (formats.size(1023), "1023 B"),
        (formats.size(1536), "1.5 KiB"),
        (formats.size(3 * 2**30), "3.00 GiB"),
        (formats.power(1e-5), "1 × 10⁻⁵"),
        (formats.power(2.5e-3), "2.5 × 10⁻³"),
        (formats.signed(-0.0814), "−0.081"),
        (formats.signed(0.2), "+0.200"),
        (formats.significant(17.94), "17.9"),
        (formats.significant(1234.5), "1234"),
        (formats.interval({"auc_low": 0.7, "auc_high": 0.9}, "auc"), "0.700–0.900"),
        (formats.interval({"auc_low": 0.7}, "auc"), ""),
    ],
)
def test_numbers_read_as_a_person_writes_them(shown: str, expected: str) -> None:
    assert shown.replace("\u00a0", " ") == expected


@given(value=st.one_of(st.none(), st.booleans(), st.text(), st.sampled_from([math.nan, math.inf, -math.inf, 10**999])))
def test_what_is_no_finite_number_becomes_a_dash(value: object) -> None:
    for show in (formats.decimals, formats.signed, formats.significant):
        assert show(value) == "–"
    for show in (formats.duration, formats.size, formats.power):
        assert show(value) == "–"


@given(value=st.floats(0, 1e12))
def test_a_size_in_words_is_within_one_percent_of_the_bytes(value: float) -> None:
    amount, unit = formats.size(value).split("\u00a0")
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    assert float(amount) * units[unit] == pytest.approx(value, rel=0.01)


def test_the_summary_picture_is_wide_and_the_same_every_time(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    folder = write_study(tmp_path / "demo", arms=("federated", "pooled"))
    first, second = (summary_picture(folder, tmp_path / f"{name}.png") for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    picture = np.asarray(Image.open(first).convert("RGB")).astype(int)
    assert picture.shape == (600, 1600, 3)
    orange = (abs(picture - [255, 159, 64]).sum(axis=-1) < 30)[:, :900]
    teal = (abs(picture - [55, 208, 180]).sum(axis=-1) < 30)[:, :900]
    assert orange.sum() > 100, "the prediction's outline"
    assert teal.sum() > 100, "the truth's outline"


def test_the_summary_picture_needs_something_to_draw(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"arms": ["federated"]}')
    with pytest.raises(StudyError, match="nothing to draw yet"):
        summary_picture(tmp_path, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("keep", ["metrics.jsonl", "results.json"])
def test_the_summary_picture_leaves_out_what_is_not_there(
    tmp_path: Path, write_study: Callable[..., Path], keep: str
) -> None:
    folder = write_study(tmp_path / "demo", arms=("federated",))
    for name in {"metrics.jsonl", "results.json", "overlays.npz"} - {keep}:
        (folder / "federated" / name).unlink()
    with Image.open(summary_picture(folder, tmp_path / "out.png")) as picture:
        assert picture.size == (1600, 600)
