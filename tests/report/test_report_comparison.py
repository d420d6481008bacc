"""Trainings side by side: every figure is the one that was recorded, and says what its interval is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from capsfl.learning import metrics
from capsfl.report import build_page, comparison, tables
from capsfl.report.study import Study, read_study

WriteStudy = Callable[..., Path]


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_study: WriteStudy) -> Path:
    """A study with an arm in which each hospital is left out once, and hospitals that log in folders of their own."""
    place = write_study(tmp_path_factory.mktemp("study") / "demo", arms=("federated", "local"))
    edit(place / "study.json", lambda study: study["arms"].append("leave-one-out"))
    results = json.loads((place / "federated/results.json").read_text())
    members = json.loads(json.dumps(dict.fromkeys("ABC", results)))
    for number, name in enumerate("ABC"):
        members[name]["classification"]["overall"] |= {"auc": 0.6 + number / 10, "auc_low": 0.5, "auc_high": 0.9}
        members[name]["classification"]["overall"]["accuracy"] = 0.5 + number / 10
    absent = results | {"partition": "leave-one-out", "members": members, "overlays": []}
    absent["classification"] = absent["classification"] | {"overall": {"accuracy": 0.6, "auc": 0.7}}
    (place / "leave-one-out").mkdir()
    (place / "leave-one-out/results.json").write_text(json.dumps(absent))
    edit(place / "federated/results.json", lambda table: table["classification"]["overall"].update(accuracy=0.75))
    (place / "local/metrics.jsonl").unlink()
    for number, name in enumerate("AB"):
        rows = [
            {"task": "classification", "round": n, "member": name, "loss": 1.0,
             "hospitals": {"A": {"sensitivity": 0.1 * n + 0.2 * number}, "B": {"sensitivity": 0.2}, "C": {}}}
            for n in (1, 2)
        ]  # fmt: skip
        (place / "local" / name).mkdir()
        (place / "local" / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    return read_study(folder)


def test_sensitivity_is_the_mean_over_hospitals_and_over_models_of_hospitals(study: Study):
    lines = comparison.sensitivity_lines(study)
    assert list(lines) == ["federated", "local"]
    first, second = lines["local"]
    assert (first.place, first.value, first.low, first.high) == pytest.approx(
        (1, (0.1 + 0.3 + 0.2 + 0.2) / 4, 0.1, 0.3)
    )
    assert (second.value, second.low, second.high) == pytest.approx((0.25, 0.2, 0.4))
    own = [record["hospitals"] for record in study.arms[0].rounds_of("classification")]
    assert lines["federated"][7].low == min(row["sensitivity"] for row in own[7].values())


@pytest.mark.parametrize(("right", "count"), [(0, 5), (3, 4), (40, 40), (61, 98)])
def test_an_accuracy_has_wilson_s_interval(right: int, count: int):
    known = binomtest(right, count).proportion_ci(method="wilson")
    assert comparison.wilson(right / count, count) == pytest.approx((known.low, known.high), abs=1e-6)


def test_accuracies_stand_beside_each_other_over_the_most_frequent_class(study: Study):
    rows = {row.name: row for row in comparison.accuracy_rows(study)}
    assert rows.keys() == {"federated", "leave-one-out"}, "an arm without an accuracy has no row"
    assert (rows["federated"].low, rows["federated"].high) == comparison.wilson(0.75, 72)
    assert (rows["leave-one-out"].value, rows["leave-one-out"].low, rows["leave-one-out"].high) == (0.6, 0.5, 0.7)
    assert comparison.frequent_share(study) == 0.5


def test_the_matrix_has_a_row_for_who_trained_and_a_column_for_who_was_tested(study: Study):
    table = comparison.cross_site(study, "classification")
    assert table is not None
    assert (table.rows, table.columns, table.apart) == (["A", "B", "C", "federated"], ["A", "B", "C"], 3)
    alone = study.arms[1].results["members"]
    for name, row in zip("ABC", table.cells, strict=False):
        for column, cell in zip("ABC", row, strict=True):
            found = alone[name]["classification"]["hospitals"][column]
            assert (cell.value, cell.low, cell.high) == (found["auc"], found["auc_low"], found["auc_high"])


def test_a_hospital_left_out_is_set_beside_itself_taking_part(study: Study):
    rows = comparison.left_out_rows(study, "classification")
    assert [row.name for row in rows] == ["A", "without A", "B", "without B", "C", "without C"]
    there = study.arms[0].results["classification"]["hospitals"]
    assert [row.value for row in rows[::2]] == [there[name]["auc"] for name in "ABC"]
    assert [row.value for row in rows[1::2]] == [0.6, 0.7, 0.8]
    assert {(row.low, row.high) for row in rows[1::2]} == {(0.5, 0.9)}
    assert len({row.colour for row in rows}) == 2


def test_the_page_has_all_of_it_and_says_who_was_left_out(folder: Path):
    page = build_page(folder).read_text()
    for words in (
        "Side by side",
        "Sensitivity over rounds",
        "AUC from site to site",
        "Dice of a hospital that was not",
    ):
        assert words in page
    assert '<span class="name">A</span> <small>left out</small>' in page
    assert '<span class="name">A</span> <small>alone</small>' in page


def test_a_study_of_one_arm_without_rounds_has_no_such_section(tmp_path: Path, write_study: WriteStudy):
    place = write_study(tmp_path / "demo", arms=("federated",))
    (place / "federated/metrics.jsonl").unlink()
    assert comparison.comparison(read_study(place)) == []
    assert "Side by side" not in build_page(place).read_text()


def test_the_leading_training_is_held_against_the_others_on_the_same_patients(folder: Path, tmp_path: Path):
    place = Path(shutil.copytree(folder, tmp_path / "study"))

    def blur(table: Any) -> None:
        for number, row in enumerate(table["classification"]["scores"]):
            row["score"] = 0.4 * row["score"] + 0.6 * (number * 7 % 72) / 72

    edit(place / "local/results.json", blur)
    own, other = (
        [
            [row["score"], row["label"]]
            for row in json.loads((place / arm / "results.json").read_text())["classification"]["scores"]
        ]
        for arm in ("federated", "local")
    )
    row, *others = comparison.paired_rows(read_study(place))
    assert not others, "an arm with the same scores cannot be told apart"
    expected = [metrics.auc(*(np.array(column) for column in zip(*arm, strict=True))) or 0 for arm in (own, other)]
    assert row.name == "local"
    assert row.value == pytest.approx(expected[0] - expected[1])
    assert row.low is not None
    assert 0 < row.low < row.value
    assert "<h3>federated against each other training</h3>" in build_page(place).read_text()

    # Of other patients there is no difference.
    edit(place / "local/results.json", lambda table: table["classification"]["scores"].pop())
    assert comparison.paired_rows(read_study(place)) == []


def test_trainings_that_differ_in_their_seed_alone_get_a_line_with_mean_and_range(
    tmp_path: Path, write_study: WriteStudy
):
    place = write_study(tmp_path / "study", arms=("federated", "private", "pooled"))
    arms = [{"name": "federated", "seed": None}, {"name": "private", "seed": None, "noise_multiplier": 1.0}]
    arms.append({"name": "pooled", "seed": 5})
    edit(place / "study.json", lambda study: study["configuration"].update(arms=arms))
    study = read_study(place)
    assert tables.arms_by_seed(study) == [["federated", "pooled"]]
    compared = tables.compare(study, "classification")
    assert compared is not None
    names = [row.name for row in compared.rows if row.kind != "control"]
    assert names == ["federated", "private", "pooled", "federated, 2 seeds"]
    row = compared.rows[3]
    assert row.values["auc"] == pytest.approx((0.9126 + 0.9345) / 2)
    assert (row.values["auc_low"], row.values["auc_high"]) == (0.9126, 0.9345)
    assert row.margin == pytest.approx(row.values["auc"] - 0.7719)
    assert row.name not in [each.name for each in tables.estimates(study, compared)]
    page = build_page(place).read_text()
    assert '<span class="name">federated, 2 seeds</span> <small>mean; as interval the lowest and the highest' in page


def test_a_hospital_left_out_is_held_against_the_controls_on_its_own_patients(folder: Path, tmp_path: Path):
    place = Path(shutil.copytree(folder, tmp_path / "study"))

    def set_controls(table: Any) -> None:
        for number, name in enumerate("ABC"):
            controls = table["members"][name]["classification"]["controls"]
            controls["dense lung fraction"]["auc"] = 0.55 + 0.2 * number
        table["classification"]["controls"] = {"dense lung fraction": {"auc": 0.75}}

    edit(place / "leave-one-out/results.json", set_controls)
    compared = tables.compare(read_study(place), "classification")
    assert compared is not None
    margins = {
        row.name: row.margin for row in compared.rows if row.note.startswith(("left out", "each hospital judged"))
    }
    assert margins == pytest.approx({"leave-one-out": -0.05, "A": 0.05, "B": -0.05, "C": -0.15})
