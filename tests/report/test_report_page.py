"""The page says what the files say, nothing more, and stands alone."""

import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capsfl.report import StudyError, build_page
from capsfl.report.published import PUBLISHED

WriteStudy = Callable[..., Path]
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reading(HTMLParser):
    """Collects tags, attributes and visible text; refuses tags that do not close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.pieces: list[str] = []
        self.stack: list[str] = []
        self.feed(page)
        self.close()
        assert self.stack == []
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] != "style":
            self.pieces.append(data)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    record = json.loads(path.read_text())
    replacement = change(record)
    path.write_text(json.dumps(record if replacement is None else replacement))


def read_page(folder: Path) -> Reading:
    return Reading(build_page(folder).read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, write_study: WriteStudy) -> tuple[str, Reading]:
    page = build_page(write_study(tmp_path_factory.mktemp("study") / "demo")).read_text()
    return page, Reading(page)


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(["0.913", "0.843–0.963", "+0.141 over dense lung fraction"], id="headline AUC"),
        pytest.param(["0.783", "0.743–0.813", "+0.371 over HU threshold"], id="headline Dice"),
        pytest.param(["17.9", "δ = 1 × 10⁻⁵", "AUC −0.081, Dice −0.091 against federated"], id="epsilon"),
        pytest.param(["phantom", "1 min 36 s", "3 min 32 s"], id="road"),
        pytest.param(["0.773", "0.723", "0.733", "0.809"], id="Dice by plane and hospital"),
        pytest.param(["P000, hospital A · plane xy, slice 40 · Dice 0.783"], id="overlays"),
        pytest.param(["pooled", "0.934", "+0.163", "local", "A alone", "0.813"], id="arms"),
        pytest.param(["always positive", "permuted labels", "dense lung fraction", "0.482"], id="controls"),
        pytest.param(["Dashed: the threshold, 0.437", "All 72 patients", "P071"], id="patients"),
        pytest.param(["add or remove one hospital", "PLD", "changes any outcome's odds"], id="privacy"),
        pytest.param(["3 hospitals are too few", "4.38", "91.8"], id="few hospitals"),
        pytest.param(["federated, segmentation, 20 rounds", "local, classification, 20 rounds"], id="curves"),
        pytest.param(["1.50 GiB", "cpu, 2 cores", "jax 0.10.2", "668 MiB"], id="runtime"),
        pytest.param(["c0ffee" * 10 + "beef", "ab" * 32, "52 checks passed, 1 with a reservation"], id="ledger"),
        pytest.param(["privacy.noise_multiplier", "1.125", "xy, yz", "d1ce" * 16], id="configuration"),
        pytest.param(["Not for clinical use."], id="warning"),
    ],
)
def test_every_section_shows_its_numbers(whole: tuple[str, Reading], numbers: list[str]) -> None:
    for number in numbers:
        assert number in whole[1].text


def test_a_page_needs_no_other_file_and_no_network(whole: tuple[str, Reading]) -> None:
    page, reading = whole
    words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//[a-z]|@import|file:", words, re.IGNORECASE)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(reading.tags)
    names = {value for _, name, value in reading.attributes if name == "id"}
    for tag, name, value in reading.attributes:
        assert name != "src"
        if name in {"href", "xlink:href"}:
            assert value.startswith("data:image/png;base64," if tag == "image" else "#")
            assert tag == "image" or value[1:] in names
    assert all(target in names for target in re.findall(r"url\(#([^)]*)\)", page))
    assert "Content-Security-Policy" in page


def test_names_are_unique_in_the_page(whole: tuple[str, Reading]) -> None:
    names = [value for tag, name, value in whole[1].attributes if name == "id" and tag != "image"]
    assert len(names) == len(set(names))


def test_hostile_names_are_shown_and_do_nothing(tmp_path: Path, write_study: WriteStudy) -> None:
    folder = write_study(tmp_path / "demo", arms=("federated",))
    hostile = "</text></svg><script>alert('1')</script><img src=x onerror=\"alert(2)\">&$x$"

    def rename(results: Any) -> None:
        results["overlays"][0]["patient"] = hostile
        results["classification"]["scores"][0] |= {"patient": hostile, "hospital": hostile}
        results["classification"]["hospitals"][hostile] = results["classification"]["hospitals"].pop("A")
        results["classification"]["controls"][hostile] = {"auc": 0.1}

    edit(folder / "federated" / "results.json", rename)
    edit(folder / "study.json", lambda study: study.update(name=hostile, device=hostile))
    edit(folder / "federated" / "ledger.json", lambda ledger: ledger["findings"][0].update(detail=hostile))
    reading = read_page(folder)
    assert not {"script", "img"} & set(reading.tags)
    assert not [name for _, name, _ in reading.attributes if name.startswith("on") or name == "src"]
    assert reading.text.count("<script>alert('1')</script>") >= 6


def test_names_in_any_script_and_with_control_characters_are_drawn(tmp_path: Path, write_study: WriteStudy) -> None:
    folder = write_study(tmp_path / "demo", arms=("federated",))
    edit(
        folder / "federated" / "results.json",
        lambda results: results["classification"]["scores"].append(
            {"patient": "\ud800", "hospital": "北京\x00\n_医院", "label": 1, "score": 0.5}
        ),
    )
    assert "北京  _医院" in build_page(folder).read_text()


def test_controls_stand_in_the_table_even_if_the_study_recorded_none(tmp_path: Path, write_study: WriteStudy) -> None:
    folder = write_study(tmp_path / "demo", arms=("federated",))

    def forget(results: Any) -> None:
        results["classification"].pop("controls")
        results["segmentation"].pop("controls")
        results["classification"]["overall"] |= {"patients": 80, "positives": 50}

    edit(folder / "federated" / "results.json", forget)
    text = read_page(folder).text
    for control in ("permuted labels", "dense lung fraction", "HU threshold"):
        assert f"{control} not recorded" in text
    # Calling all 80 patients positive: sensitivity 1, specificity 0, precision 50/80.
    assert "calls every patient positive 0.500 – +0.413 0.625 0.500 1.000 0.000 0.625 – – – 50 / 80" in text
    assert "no control was recorded to compare with" in text


def test_the_page_shows_what_each_network_cost_and_told_of_the_scanner_and_every_class(
    tmp_path: Path, write_study: WriteStudy
) -> None:
    folder = write_study(tmp_path / "demo", arms=("federated", "pooled"))

    def add(results: Any) -> None:
        probe = {"of": "scanner", "balanced_accuracy": 0.6543, "balanced_accuracy_low": 0.5432, "chance": 1 / 6}
        found = results["classification"]
        found |= {"network": "resnet50", "parameters": 24108034}
        found["scanner"] = probe | {"balanced_accuracy_high": 0.7654}
        found["overall"]["classes"] = [{"class": k, "auc": 0.8 + k / 100, "patients": 24} for k in range(3)]
        found["controls"]["size and sharpness"] = {"auc": 0.7321, "brier": 0.2109}
        found["controls"].pop("dense lung fraction")

    edit(folder / "federated" / "results.json", add)
    path = folder / "federated" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"compile_seconds": 0.3}) + "\n" for row in rows))
    choice = {"chunk": 2, "trials": [{"chunk": 1, "peak_bytes": 1 << 20}, {"chunk": 2, "peak_bytes": 5 << 20}]}
    (folder / "federated" / "chunks.json").write_text(json.dumps({"classification": choice}))
    text = read_page(folder).text
    # Twenty rounds of 1.3 s, of them 0.3 s to compile, and 2.2 s of processor.
    assert "federated resnet50 24108034 20 20 s 6 s 44 s 5 MiB 668 MiB 0.654 0.543–0.765 0.167" in text
    assert "0 0.800 – – – – 24 1 0.810 – – – – 24 2 0.820" in text
    assert "Published for several classes, on other data" in text
    assert "DRE-Net Song et al. 2021" in text
    assert "not comparable row by row" in text
    assert "mean grey value and high frequencies 0.732 – +0.18" in text
    assert "dense lung fraction" not in text


def test_published_figures_of_several_classes_say_whose_data_and_where_they_were_read() -> None:
    for row in PUBLISHED:
        assert all(row)
        figures = [float(figure) for figure in re.findall(r"\b[01]?\.\d+", row.figures)]
        assert figures
        assert all(0.5 < figure < 1 for figure in figures)


def test_an_interval_that_reaches_a_control_is_not_called_better(tmp_path: Path, write_study: WriteStudy) -> None:
    folder = write_study(tmp_path / "demo", arms=("federated",))
    assert "the whole interval lies above dense lung fraction" in read_page(folder).text
    edit(
        folder / "federated" / "results.json",
        lambda results: results["classification"]["overall"].update(auc_low=0.7718),
    )
    text = read_page(folder).text
    assert "the interval reaches down to dense lung fraction: not shown to be better" in text
    assert "the whole interval lies above dense lung fraction" not in text


def test_equal_folders_give_equal_pages(tmp_path: Path, write_study: WriteStudy) -> None:
    pages = [
        build_page(write_study(tmp_path / name / "demo", arms=("federated", "private"))).read_bytes()
        for name in ("one", "two")
    ]
    assert pages[0] == pages[1]


def test_a_page_that_a_killed_process_left_half_written_goes_with_the_next_one(
    tmp_path: Path, write_study: WriteStudy
) -> None:
    folder = write_study(tmp_path / "demo")
    dead, alive = (folder / f".report.html.{number}.partial" for number in (999999999, os.getppid()))
    dead.touch()
    alive.touch()
    build_page(folder)
    assert not dead.exists()
    assert alive.exists(), "another process may still be writing it"


def drop(*names: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / "federated" / name).unlink()

    return apply


def without_task(task: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        edit(folder / "federated" / "results.json", lambda results: results.pop(task) and None)
        path = folder / "federated" / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines(True) if json.loads(line)["task"] != task]
        path.write_text("".join(kept))

    return apply


@pytest.mark.parametrize(
    ("reduce", "present", "absent"),
    [
        pytest.param(
            drop("results.json", "overlays.npz", "ledger.json"),
            "No results yet from federated (40 rounds logged).",
            "Receiver operating",
            id="rounds only",
        ),
        pytest.param(
            drop("metrics.jsonl", "results.json", "overlays.npz", "ledger.json"),
            "No results yet from federated (0 rounds logged).",
            "20 rounds",
            id="only study.json",
        ),
        pytest.param(drop("overlays.npz"), "HU threshold", "slice 40", id="no overlays"),
        pytest.param(drop("ledger.json"), "no ledger file yet", "Merkle root", id="no ledger"),
        pytest.param(drop("metrics.jsonl"), "0.913", "20 rounds", id="no metrics"),
        pytest.param(without_task("segmentation"), "AUC, federated", "Dice", id="classification only"),
        pytest.param(without_task("classification"), "Dice, federated", "AUC", id="segmentation only"),
    ],
)
def test_a_partial_study_renders_what_is_there(
    tmp_path: Path, write_study: WriteStudy, reduce: Callable[[Path], None], present: str, absent: str
) -> None:
    folder = write_study(tmp_path / "demo", arms=("federated",))
    reduce(folder)
    text = read_page(folder).text
    assert present in text
    assert absent not in text


def test_a_study_record_with_nothing_but_its_arms_renders(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"arms": ["federated"]}')
    assert "0 rounds logged" in read_page(tmp_path).text


def test_the_last_line_may_be_torn_and_a_round_logged_twice_counts_once(
    tmp_path: Path, write_study: WriteStudy
) -> None:
    folder = write_study(tmp_path / "demo", arms=("federated",))
    path = folder / "federated" / "metrics.jsonl"
    lines = path.read_text().splitlines(True)
    path.write_text("".join([*lines, lines[-1], lines[-1][:30]]))
    assert "federated, classification, 20 rounds" in read_page(folder).text
    assert "classification 20 26 s" in read_page(folder).text  # 20 rounds of 1.3 s: no round counted twice


def break_json(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_text('{"arms": [')

    return apply


def break_line(folder: Path) -> None:
    path = folder / "federated" / "metrics.jsonl"
    path.write_text("{torn\n" + path.read_text())


def break_shapes(folder: Path) -> None:
    np.savez(folder / "federated" / "overlays.npz", hu_0=np.zeros((4, 5)), truth_0=np.zeros((5, 4), bool))


def pickle_overlays(folder: Path) -> None:
    np.savez(folder / "federated" / "overlays.npz", hu_0=np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda folder: (folder / "study.json").unlink(), "no study.json here", id="no study"),
        pytest.param(break_json("study.json"), "study.json: not JSON", id="study"),
        pytest.param(break_json("federated/results.json"), "results.json: not JSON", id="results"),
        pytest.param(
            lambda folder: (folder / "federated" / "ledger.json").write_text("[" * 100_000),
            "ledger.json: not JSON",
            id="nested",
        ),
        pytest.param(break_line, "metrics.jsonl line 1: not JSON", id="metrics"),
        pytest.param(
            lambda folder: edit(folder / "study.json", lambda study: study.update(arms=["../secret"])),
            "must list plain folder names",
            id="arm outside",
        ),
        pytest.param(
            lambda folder: edit(folder / "study.json", lambda study: study.update(primary="other")),
            "primary is 'other'",
            id="primary",
        ),
        pytest.param(break_shapes, r"truth_0 is \(5, 4\), hu_0 is \(4, 5\)", id="overlay shapes"),
        pytest.param(pickle_overlays, "overlays.npz: cannot be read", id="pickled overlays"),
        pytest.param(
            lambda folder: (folder / "federated" / "overlays.npz").write_bytes(b"PK\x03\x04"),
            "overlays.npz: cannot be read",
            id="torn overlays",
        ),
    ],
)
def test_damage_is_named_in_one_line_and_leaves_no_page(
    tmp_path: Path, write_study: WriteStudy, damage: Callable[[Path], None], message: str
) -> None:
    folder = write_study(tmp_path / "demo", arms=("federated",))
    damage(folder)
    with pytest.raises(StudyError, match=message) as caught:
        build_page(folder)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert not list(folder.glob("*report*"))


def test_a_failed_write_keeps_the_page_that_was_there(
    tmp_path: Path, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_study(tmp_path / "demo", arms=("federated",))
    (folder / "report.html").write_text("the page of yesterday")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        build_page(folder)
    assert (folder / "report.html").read_text() == "the page of yesterday"
    assert sorted(path.name for path in folder.iterdir()) == ["federated", "report.html", "study.json"]


def test_large_overlays_keep_the_page_under_six_megabytes(tmp_path: Path, write_study: WriteStudy) -> None:
    folder = write_study(tmp_path / "demo", arms=("federated",))
    generator = np.random.default_rng(0)
    arrays = {}
    for key in range(12):
        arrays[f"hu_{key}"] = generator.normal(-600, 300, size=(700, 700)).astype(np.float32)
        arrays[f"prediction_{key}"] = np.zeros((700, 700), np.float32)
    arrays["prediction_1"] = generator.random((700, 700)).astype(np.float32)  # outlines of megabytes
    np.savez(folder / "federated" / "overlays.npz", **arrays)
    overlays = [{"patient": "P", "key": str(key)} for key in range(12)]
    edit(folder / "federated" / "results.json", lambda results: results.update(overlays=overlays))
    page = build_page(folder)
    assert page.stat().st_size < 6_000_000
    assert page.read_text().count('<svg class="triptych"') == 5


def test_a_failed_check_comes_first_and_marks_its_block(tmp_path: Path, write_study: WriteStudy) -> None:
    folder = write_study(tmp_path / "demo", arms=("federated",))

    def tamper(ledger: Any) -> None:
        ledger["findings"][30]["status"] = "failed"  # round 8: four checks a round, from round 1
        ledger["findings"][31]["status"] = "a word nobody agreed on"

    edit(folder / "federated" / "ledger.json", tamper)
    page = build_page(folder).read_text()
    text = Reading(page).text
    assert "50 checks passed, 1 with a reservation, 2 failed" in text
    assert text.index("configuration hash failed") < text.index("votes unverifiable")
    marked = re.findall(r'<li class="bad"[^>]*><b>(\d+)', page)
    assert marked == ["8"]


@pytest.mark.parametrize(
    ("hospitals", "unit", "remark"), [(3, "hospital", True), (3, "patient", False), (60, "hospital", False)]
)
def test_the_remark_on_few_hospitals_stands_where_it_is_true(
    tmp_path: Path, write_study: WriteStudy, hospitals: int, unit: str, remark: bool
) -> None:
    folder = write_study(tmp_path / "demo", arms=("private",))
    edit(folder / "private" / "results.json", lambda results: results["privacy"].update(unit=unit))
    names = ["A", "B", "C", *(f"H{place}" for place in range(hospitals - 3))]
    with (folder / "private" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"task": "segmentation", "round": 21, "cohort": names}) + "\n")
    assert ("too few for a meaningful hospital-level" in read_page(folder).text) is remark


def test_a_study_without_privacy_says_so(tmp_path: Path, write_study: WriteStudy) -> None:
    text = read_page(write_study(tmp_path / "demo", arms=("federated",))).text
    assert "no arm of this study carries a privacy guarantee" in text
    assert "ε 17.9" not in text


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([float("nan"), float("inf"), -1e308, 10**400, -3, 0]),
    st.text(max_size=8),
    st.lists(st.one_of(st.none(), st.text(max_size=3), st.floats()), max_size=3),
    st.dictionaries(st.text(max_size=4), st.one_of(st.none(), st.integers(), st.text(max_size=3)), max_size=2),
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_an_unexpected_type_is_shown_or_refused_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, write_study: WriteStudy, data: st.DataObject
) -> None:
    folder = write_study(tmp_path_factory.mktemp("junk") / "demo", arms=("federated",))
    path = folder / "federated" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:2]))
    name = data.draw(st.sampled_from(["study.json", "federated/results.json", "federated/ledger.json"]))
    record = json.loads((folder / name).read_text())
    for _ in range(4):
        place: Any = record
        while True:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
                break
            place = place[key]
        place[key] = data.draw(JUNK)
    (folder / name).write_text(json.dumps(record))
    try:
        page = build_page(folder).read_text()
    except StudyError:
        return
    Reading(page)
