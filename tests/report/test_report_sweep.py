"""The page of a sweep: the frontier is one, intervals are what they are called, nothing is fetched."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from capsfl.report import StudyError, build_sweep_page
from capsfl.report.studies import Summary, best_within, frontier, read_sweep, summarise


def row(number: int, *, utility: float | None = 0.5, epsilon: float | None = 1.0, seed: int = 0, **rest: Any) -> dict:
    return {
        "study": number, "seed": seed, "setting": {"privacy.clip_norm": 1.0}, "group": "", "epsilon": epsilon,
        "delta": 1e-5, "relation": "add_or_remove_one", "unit": "hospital", "accountant": "PLD",
        "noise_multiplier": 1.0,
        "utility": utility, "loss": 0.3, "left_out": 0, "status": "finished" if utility is not None else "diverged",
        "curve": [{"round": 1, "accuracy": 0.2}, {"round": 2, "accuracy": utility}],
    } | rest  # fmt: skip


def summary(epsilon: float | None, mean: float | None) -> Summary:
    return Summary({}, "", epsilon, False, [], 0, mean, None, None)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0, 1)), min_size=1, max_size=30))
def test_nobody_does_better_for_less_than_a_point_of_the_frontier(points):
    rows = [summary(epsilon, mean) for epsilon, mean in points]
    best = frontier(rows)
    for point in best:
        assert not [r for r in rows if (r.epsilon or 0) <= (point.epsilon or 0) and (r.mean or 0) > (point.mean or 0)]
    for other in rows:
        assert any((p.epsilon or 0) <= (other.epsilon or 0) and (p.mean or 0) >= (other.mean or 0) for p in best)
    assert [p.epsilon for p in best] == sorted(p.epsilon or 0 for p in best)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0, 1)), min_size=1, max_size=30), st.floats(0.01, 100))
def test_the_best_within_a_budget_keeps_to_it(points, budget):
    rows = [summary(epsilon, mean) for epsilon, mean in points]
    found = best_within(rows, budget)
    within = [mean for epsilon, mean in points if epsilon <= budget]
    assert (found.mean if found else None) == (max(within) if within else None)


def test_an_interval_over_seeds_is_student_s():
    values = [0.5, 0.6, 0.8, 0.7]
    (found,) = summarise([row(n, utility=value, seed=n) for n, value in enumerate(values)])
    half = 3.182446 * statistics.stdev(values) / 2  # the 97.5 % quantile with three degrees of freedom
    assert (found.low, found.high) == pytest.approx((0.65 - half, 0.65 + half), abs=1e-6)
    (alone,) = summarise([row(0)])
    assert (alone.mean, alone.low, alone.high) == (0.5, None, None)


def test_a_diverged_seed_is_counted_and_not_averaged():
    (found,) = summarise([row(0, utility=0.4), row(1, utility=None, seed=1)])
    assert (found.mean, found.diverged) == (0.4, 1)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A folder with two groups, with and without noise, and names that are not to be trusted."""
    rows = []
    for group in ("<b>mlp</b>", "cnn $x^2$"):
        for noise, epsilon in ((0.0, None), (0.5, 8.0), (1.0, 2.0)):
            for seed in (0, 1):
                setting = {"privacy.noise_multiplier": noise, "problem.model.kind": group}
                utility = 0.9 - noise / 3 + 0.01 * seed
                extra = {"setting": setting, "group": group, "noise_multiplier": noise, "seed": seed}
                rows.append(row(len(rows), utility=utility, epsilon=epsilon, **extra))
    record = {
        "name": "privacy & <i>utility</i>", "studies": len(rows) + 3, "utility": "accuracy",
        "configuration": {"privacy": {"clip_norm": 1.0}}, "configuration_hash": "ab" * 32,
    }  # fmt: skip
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return tmp_path


def test_the_page_says_what_was_found_and_fetches_nothing(sweep):
    page = build_sweep_page(sweep).read_text()
    assert "privacy &amp; &lt;i&gt;utility&lt;/i&gt;" in page
    assert "&lt;b&gt;mlp" in page
    assert "<b>mlp" not in page
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert not re.search(r"https?://", page)
    assert "12 of 15 studies are finished" in page
    assert "0.905" in page  # the best without noise
    assert "0.738" in page  # the best within epsilon 10
    assert "ε from 2 to 8" in page
    assert page.count('<svg class="chart"') == 3  # frontier, noise multiplier, curves
    assert build_sweep_page(sweep).read_text() == page
    with Image.open(sweep / "frontier.png") as picture:
        assert picture.size[0] > 1000
    assert "<svg" in (sweep / "frontier.svg").read_text()


def test_a_sweep_without_any_guarantee_has_a_page_too(sweep):
    rows = [row(0, epsilon=None, noise_multiplier=0.0, utility=None)]
    (sweep / "results.jsonl").write_text(json.dumps(rows[0]) + "\n")
    page = build_sweep_page(sweep).read_text()
    assert "No study here carries a guarantee" in page
    assert "1 diverged" in page


@pytest.mark.parametrize(("file", "text"), [("sweep.json", None), ("results.jsonl", "{"), ("sweep.json", "[]")])
def test_a_folder_that_is_no_sweep_is_refused_by_name(sweep, file, text):
    if text is None:
        (sweep / file).unlink()
    else:
        (sweep / file).write_text(text)
    with pytest.raises(StudyError, match=str(sweep)):
        read_sweep(sweep)


def test_what_another_hospital_adds_is_drawn_with_its_interval_over_seeds(sweep):
    rows = []
    for hospitals in (4, 1, 2):
        for seed, aside in enumerate((-0.01, 0.0, 0.01)):
            setting = {"problem.hospitals": hospitals, "problem.model.kind": "mlp"}
            figures = {"utility": 0.5 + hospitals / 10 + aside, "loss": 1 / hospitals, "seconds": 8.0 * hospitals}
            rows.append(row(len(rows), setting=setting, seed=seed, rounds=4, epsilon=None, **figures))
    rows.append(row(9, setting=rows[0]["setting"], seed=3, utility=None, epsilon=None, seconds=900.0, rounds=4))
    (sweep / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    page = build_sweep_page(sweep).read_text()
    section = page[page.index('<section id="providers">') : page.index('<section id="studies">')]
    assert section.count('<svg class="chart"') == 3
    cells = [re.findall(r'<td class="n">([^<]*)</td>', line) for line in section.split("<tr>")[2:]]
    half = 4.302653 * 0.01 / 3**0.5  # the 97.5 % quantile with two degrees of freedom
    for number, found in zip((1, 2, 4), cells, strict=True):
        mean = 0.5 + number / 10
        # The seed that came to no end counts nowhere.
        assert found == [
            str(number), f"{mean:.3f}", f"{mean - half:.3f} to {mean + half:.3f}", f"{1 / number:.3f}",
            f"{1 / number:.3f} to {1 / number:.3f}", f"{2 * number:.3f}", f"{2 * number:.3f} to {2 * number:.3f}", "3",
        ]  # fmt: skip


def test_a_sweep_of_one_number_of_hospitals_has_no_such_section(sweep):
    assert 'id="providers"' not in build_sweep_page(sweep).read_text()
