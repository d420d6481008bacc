"""The paper's figures on one page: what the results hold is drawn, what they lack is named with its command."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from capsfl.commands import report as command
from capsfl.report import StudyError, build_figures_page
from capsfl.report.paper import FIGURES

WriteStudy = Callable[..., Path]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, write_study: WriteStudy) -> Path:
    """Federated, pooled and local; the accuracies that the figures compare are recorded."""
    place = write_study(tmp_path_factory.mktemp("study") / "sites", arms=("federated", "pooled", "local"))
    for number, arm in enumerate(("federated", "pooled", "local")):
        results = json.loads((place / arm / "results.json").read_text())
        results["classification"]["overall"]["accuracy"] = 0.7 + 0.03 * number
        (place / arm / "results.json").write_text(json.dumps(results))
    record = json.loads((place / "study.json").read_text())
    (place / "study.json").write_text(json.dumps(record | {"command": "capsfl train my.toml --seed '<3>'"}))
    return place


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two numbers of hospitals with two seeds each, as processes leave them."""
    place = tmp_path / "providers"
    (place / "parts").mkdir(parents=True)
    rows = [
        {"study": 2 * number + seed, "seed": seed, "setting": {"problem.hospitals": hospitals}, "group": "",
         "epsilon": None, "noise_multiplier": 0.0, "accountant": "", "utility": 0.6 + 0.01 * seed, "loss": 0.3,
         "seconds": 8.0, "rounds": 4, "left_out": 0, "status": "finished", "scores": {}, "curve": []}
        for number, hospitals in enumerate((1, 2)) for seed in (0, 1)
    ]  # fmt: skip
    (place / "sweep.json").write_text(json.dumps({"name": "providers", "utility": "accuracy", "configuration": {}}))
    (place / "parts" / "0-of-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A folder of benchmark results, of which one has a figure."""
    place = tmp_path / "results"
    place.mkdir()
    scores = {"mean": 0.8412, "low": 0.7, "high": 0.95}
    result = {"benchmark": "segmenters-lungs", "task": "lungs", "summary": {"segcaps": {"dice": scores}}}
    result |= {"networks": {"segcaps": {"parameters": 89581}}}
    (place / "segmenters-lungs-cpu.json").write_text(json.dumps(result))
    (place / "routing-cpu.json").write_text("{}")
    Image.new("RGB", (8, 4)).save(place / "segmenters-lungs-cpu.png")
    return place


def test_a_page_of_several_results_has_every_figure_they_hold_with_the_command_that_makes_it_again(
    study: Path, sweep: Path, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "new" / "figures.html"
    assert command.run([*map(str, (study, sweep, measured)), "--out", str(out)]) == 0
    page = out.read_text()
    told = capsys.readouterr().out
    assert [line.split(":")[0] for line in told.splitlines()] == [
        "page", "missing", "missing",
    ]  # fmt: skip
    assert "missing: Ours, Privacy against utility: capsfl sweep configs/sweep_privacy.toml" in told
    assert "7 of 9 figures, from 3 results: demo, providers, segmenters-lungs-cpu." in page
    sections = page.split("<section ")[1:]
    numbers = [re.findall(r'"eyebrow">([^<]*)<', section)[0] for section in sections]
    assert numbers == [*(f"Figure {number}" for number in range(8, 14)), "Ours"]
    assert [section.count('<svg class="chart"') for section in sections] == [1, 1, 0, 1, 1, 1, 2]
    assert page.count('src="data:image/png;base64,') == 1
    assert "SegCaps 0.84 (0.70 to 0.95) with 89,581 parameters" in page
    assert sections[0].count("<code>capsfl train my.toml --seed &#39;&lt;3&gt;&#39;</code>") == 1
    assert "<code>capsfl sweep configs/providers.toml</code>" in sections[3], "this sweep does not say its command"
    assert page.count('<span class="tone warn">missing</span> <code>capsfl') == 2


def test_the_page_stands_alone_and_is_the_same_again(study: Path, measured: Path, tmp_path: Path):
    first, _ = build_figures_page([study, measured], tmp_path / "one.html")
    second, missing = build_figures_page([study, measured], tmp_path / "two.html")
    page = first.read_text()
    assert page == second.read_text()
    assert [figure.number for figure in missing] == ["Figure 11", "Figure 12", "Figure 13", "Ours", "Ours"]
    words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|<script|<link|@import", words)
    names = re.findall(r' id="([^"]*)"', page)
    assert len(names) == len(set(names))
    assert set(re.findall(r'<a class="name" href="#([^"]*)"', page)) <= set(names)


def test_a_result_without_its_picture_has_no_figure(measured: Path, tmp_path: Path):
    (measured / "segmenters-lungs-cpu.png").unlink()
    _, missing = build_figures_page([measured / "segmenters-lungs-cpu.json"], tmp_path / "page.html")
    assert missing == FIGURES


def test_every_figure_names_a_configuration_that_is_there(request: pytest.FixtureRequest):
    for figure in FIGURES:
        for place in re.findall(r"configs/\S+", figure.command):
            assert (request.config.rootpath / place).is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no study.json, sweep.json or segmenters"), ("{", "not JSON"), ('{"benchmark": "geyer"}', "no result of")],
)
def test_what_no_figure_can_be_drawn_from_is_refused_by_name(content: str | None, message: str, tmp_path: Path):
    place = tmp_path / "result.json"
    if content is not None:
        place.write_text(content)
    with pytest.raises(StudyError, match=f"{place}: {message}"):
        build_figures_page([place], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a folder"),
        (["a", "b", "--picture", "p.png"], "takes one study"),
        (["a", "--out", "page"], "name a file, such as page/figures.html"),
    ],
)
def test_words_that_make_no_sense_are_answered_in_one_line(words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        command.run(words)
