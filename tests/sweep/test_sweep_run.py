"""A study of a sweep is the run that a federation of its own would be; what is finished stays finished."""

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federation import Federation
from capsfl.sweeps import run, width
from capsfl.sweeps.config import ExecutionConfig
from capsfl.sweeps.points import Study, expand, group_key, plan_of, resolve
from capsfl.sweeps.problems import build
from capsfl.sweeps.program import GroupProgram
from capsfl.sweeps.results import SweepFolder, SweepFolderError, merge_results, read_rows

QUIET = Console(file=io.StringIO())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def federate(study: Study) -> tuple[Any, list[float | None], dict[str, float]]:
    """The same study by itself: weights, losses per round, scores."""
    point, built = study.point, build(study.point.problem)
    engine = Federation(
        built.make_task(point.seed),
        built.hospitals,
        config=point.training,
        privacy=point.privacy,
        devices=DevicesConfig(chunk=1),
        seed=point.seed,
    )
    state, losses = engine.init(), []
    for _ in range(point.training.rounds):
        state, report = engine.step(state)
        losses.append(report.loss)
    return state.parameters, losses, engine.evaluate(state.parameters, built.held_out)["held out"]


def advance(studies: list[Study], **options: Any) -> tuple[list[Any], list[np.ndarray]]:
    """Weights and losses of studies of one group, all at once."""
    points, built = [study.point for study in studies], build(studies[0].point.problem)
    plans = [plan_of(point, num_hospitals=len(built.hospitals)) for point in points]
    plan = max(plans, key=lambda plan: plan.num_slots)
    program = GroupProgram(points[0], built, plan, devices=jax.devices()[:1], **options)
    placed, progress = program.place(points)
    rounds = points[0].training.rounds
    progress, _ = program.advance(placed, progress, count=len(points), first=0, last=rounds)
    return program.collect(progress.state.parameters, len(points)), program.collect(progress.losses, len(points))


def largest_difference(one: Any, other: Any) -> float:
    differences = jax.tree.map(lambda a, b: np.max(np.abs(np.asarray(a) - np.asarray(b))), one, other)
    return max(jax.tree.leaves(differences))


@pytest.mark.parametrize("number", [1, 14])
def test_a_study_is_the_run_of_its_own_configuration(finished, number):
    study = resolve(expand(finished.config)[number], num_hospitals=6)
    _, losses, scores = federate(study)
    row = rows_of(finished.folder)[number]
    assert (row["study"], row["seed"]) == (number, study.point.seed)
    assert [loss is None for loss in row["losses"]] == [loss is None for loss in losses]
    for mine, alone in zip(row["losses"], losses, strict=True):
        assert mine == pytest.approx(alone, abs=1e-5)
    assert row["scores"] == pytest.approx(scores, abs=1e-5)
    assert row["epsilon"] == plan_of(study.point, num_hospitals=6).epsilon(4)


def test_caps_of_their_own_momentum_schedules_and_following_clip_norms_change_nothing(configure):
    """Different caps in one program, a server with a state, a rate that falls, S that follows a private quantile."""
    config = configure(
        sweep__grid=[{"field": "privacy.truncation", "values": [3, 6]}],
        sweep__seeds=[3],
        privacy__cohort=3,
        privacy__noise_multiplier=0.6,
        privacy__clipping="quantile",
        training__server={"optimizer": "yogi", "learning_rate": 0.1},
        training__local__schedule="cosine",
    )
    studies = [resolve(study, num_hospitals=6) for study in expand(config)]
    assert len({group_key(study.point, num_hospitals=6) for study in studies}) == 1
    weights, losses = advance(studies, width=1, passes=3, hospitals=2)
    assert largest_difference(*weights) > 1e-3, "the caps decide something"
    alone, own_losses, _ = federate(studies[0])
    assert largest_difference(weights[0], alone) < 1e-5
    np.testing.assert_allclose(losses[0], np.array(own_losses, float), atol=1e-5)


def test_every_group_is_compiled_once_and_every_study_run_once(finished):
    assert finished.traces == [1, 1]
    rows = rows_of(finished.folder)
    assert [row["study"] for row in rows] == list(range(16))
    assert {row["status"] for row in rows} == {"finished"}
    assert [row["group"] for row in rows] == ["model hidden [4]"] * 8 + ["model hidden [3]"] * 8
    parts = sorted(path.name for path in (finished.folder / "parts").iterdir())
    assert parts == ["0-of-2.json", "0-of-2.jsonl", "1-of-2.json", "1-of-2.jsonl"]
    assert "8 studies are still missing" in finished.said


def test_the_table_holds_what_the_lines_hold(finished):
    with (finished.folder / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    for line, row in zip(table, rows_of(finished.folder), strict=True):
        assert int(line["study"]) == row["study"]
        assert float(line["training.local.learning_rate"]) == row["setting"]["training.local.learning_rate"]
        assert json.loads(line["problem.model.hidden"]) == row["setting"]["problem.model.hidden"]
        assert float(line["score.accuracy"]) == row["utility"]
        assert line["epsilon"] == ("" if row["epsilon"] is None else str(row["epsilon"]))


def test_without_noise_nothing_is_claimed_and_with_noise_something_is(finished):
    for row in rows_of(finished.folder):
        assert (row["epsilon"] is None) == (row["noise_multiplier"] == 0)


def test_curves_are_scored_as_asked_and_at_the_end(finished):
    for row in rows_of(finished.folder):
        assert [point["round"] for point in row["curve"]] == [3, 4]
        assert row["curve"][-1]["accuracy"] == row["utility"]
        assert len(row["losses"]) == 4


def copy(finished, tmp_path: Path) -> Any:
    folder = Path(shutil.copytree(finished.folder, tmp_path / "copy"))
    return finished.config.model_copy(update={"out": str(folder)})


def test_a_torn_line_is_run_again_and_nothing_else(finished, tmp_path, monkeypatch):
    config = copy(finished, tmp_path)
    lines = Path(config.out) / "parts" / "1-of-2.jsonl"
    whole = lines.read_bytes()
    lines.write_bytes(whole[: whole.rstrip(b"\n").rfind(b"\n") + 30])
    ran: list[int] = []
    real = run.run_portion

    def watched(program: Any, portion: list[Study], built: Any, **options: Any) -> Any:
        ran.extend(study.number for study in portion)
        return real(program, portion, built, **options)

    monkeypatch.setattr(run, "run_portion", watched)
    execution = config.execution.model_copy(update={"part": "1/2"})
    run.run_sweep(config.model_copy(update={"execution": execution}), console=QUIET)
    assert ran == [json.loads(whole.splitlines()[-1])["study"]]
    for mine, before in zip(rows_of(Path(config.out)), rows_of(finished.folder), strict=True):
        assert mine["losses"] == pytest.approx(before["losses"], abs=1e-5, nan_ok=True)
        assert mine["scores"] == pytest.approx(before["scores"], abs=1e-5)


def test_a_finished_sweep_compiles_nothing_again(finished, tmp_path, monkeypatch):
    config = copy(finished, tmp_path)
    monkeypatch.setattr(run, "GroupProgram", None)
    # One process now, where two parts were before.
    run.run_sweep(config, console=QUIET)
    assert (Path(config.out) / "results.jsonl").read_bytes() == (finished.folder / "results.jsonl").read_bytes()


def test_another_configuration_is_refused_by_the_field_that_differs(finished, tmp_path):
    config = copy(finished, tmp_path)
    other = config.model_copy(update={"privacy": config.privacy.model_copy(update={"clip_norm": 0.25})})
    message = re.escape(f"{config.out}: made by another configuration (privacy.clip_norm was 0.5, is 0.25)")
    with pytest.raises(SweepFolderError, match=message):
        run.run_sweep(other, console=QUIET)
    assert rows_of(Path(config.out)) == rows_of(finished.folder)


def test_a_folder_of_something_else_is_left_alone(finished, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SweepFolderError, match="not empty and no sweep"):
        run.run_sweep(finished.config.model_copy(update={"out": str(tmp_path)}), console=QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_processes_cannot_hold_the_same_share(configure, tmp_path):
    config = configure(out=str(tmp_path / "sweep"))
    with (
        SweepFolder.open(config, part=0, parts=2, record={}),
        SweepFolder.open(config, part=1, parts=2, record={}),
        pytest.raises(SweepFolderError, match=r"0-of-2.jsonl: another process is at work on this part"),
    ):
        SweepFolder.open(config, part=0, parts=2, record={})


def test_lines_are_whole_or_not_there(configure, tmp_path):
    config = configure(out=str(tmp_path / "sweep"))
    row = {"study": 0, "seed": 1, "setting": {}, "scores": {"accuracy": 0.5}}
    with SweepFolder.open(config, part=0, parts=1, record={}) as folder:
        folder.append([row])
    lines = tmp_path / "sweep" / "parts" / "0-of-1.jsonl"
    with lines.open("ab") as file:
        file.write(b'{"study": 1, "se')
    assert read_rows(tmp_path / "sweep") == {0: row}
    with SweepFolder.open(config, part=0, parts=1, record={}) as folder:
        folder.append([row | {"study": 2}])
    assert [found["study"] for found in merge_results(tmp_path / "sweep")] == [0, 2]
    assert lines.read_bytes().count(b"\n") == 2


def test_a_damaged_line_is_named(configure, tmp_path):
    config = configure(out=str(tmp_path / "sweep"))
    with SweepFolder.open(config, part=0, parts=1, record={}):
        pass
    (tmp_path / "sweep" / "parts" / "0-of-1.jsonl").write_text('{"study": 0}\nrubbish\n{"study": 1}\n')
    with pytest.raises(SweepFolderError, match=r"0-of-1.jsonl: line 2 is damaged"):
        read_rows(tmp_path / "sweep")


@pytest.fixture
def flooded(configure) -> Any:
    """A study whose learning rate lets it diverge."""
    config = configure(training__local__learning_rate=1e30, privacy__noise_multiplier=0.0, privacy__clip_norm=1e38)
    return resolve(expand(config)[0], num_hospitals=6)


def test_a_study_that_diverges_is_said_to(flooded):
    built = build(flooded.point.problem)
    losses = np.array([0.5, np.nan, np.inf, np.inf])
    curve = [{"round": 4, "accuracy": None}]
    row = run.make_row(flooded, built, curve, {}, losses, 3)
    assert row["status"] == "diverged"
    assert row["left_out"] == 3
    assert row["losses"] == [0.5, None, None, None]
    assert json.loads(json.dumps(row, allow_nan=False)) == json.loads(json.dumps(row))


class Fake:
    """A program of some width, which takes so much memory and so long."""

    def __init__(self, tried: list[width.Trial], size: int, *, bytes_of: Any, seconds_of: Any) -> None:
        self.width, self.seconds = size, seconds_of(size)
        tried.append(width.Trial(size, bytes_of(size), 0.01))


def climb(
    monkeypatch, *, seconds_of: Any, bytes_of: Any = lambda size, resident: size, limit: float = 1e9
) -> tuple[int, str]:
    tried: list[width.Trial] = []
    monkeypatch.setattr(width, "_time", lambda program, points: program.seconds)
    study: Any = type("P", (), {"training": type("T", (), {"rounds": 1000})})

    def prepare(size: int, resident: int) -> Fake:
        return Fake(tried, size, bytes_of=lambda size: bytes_of(size, resident), seconds_of=seconds_of)

    found, reason = width._climb(prepare, [study] * 64, 32, tried, limit=limit, devices=2)
    return found.width, reason


@pytest.mark.parametrize(
    ("seconds_of", "expected"),
    [(lambda size: 1.0 / size, 32), (lambda size: 1.0 * size, 1), (lambda size: 1.0 + abs(size - 16), 16)],
)
def test_the_fastest_width_wins_on_a_cpu(monkeypatch, seconds_of, expected):
    assert climb(monkeypatch, seconds_of=seconds_of)[0] == expected


def test_a_width_that_does_not_fit_the_memory_is_not_taken(monkeypatch):
    found, reason = climb(monkeypatch, seconds_of=lambda size: 1.0 / size, limit=5)
    assert found == 4
    assert "memory" in reason


def test_fewer_studies_are_resident_where_all_do_not_fit(monkeypatch):
    seen: list[int] = []

    def bytes_of(size: int, resident: int) -> int:
        seen.append(resident)
        return 10 * resident

    climb(monkeypatch, seconds_of=lambda size: 1.0, bytes_of=bytes_of, limit=100)
    assert seen[:2] == [32, 10]


def test_short_sweeps_look_no_further(monkeypatch):
    found, reason = climb(monkeypatch, seconds_of=lambda size: 1e-7 / size)
    assert found == 1
    assert "cost more than it can save" in reason


@pytest.mark.parametrize(("limit", "expected"), [(1e9, 24), (10, 10), (0.1, 1)])
def test_an_accelerator_takes_as_many_studies_as_fit(limit, expected):
    tried: list[width.Trial] = []

    def prepare(size: int, resident: int) -> Fake:
        return Fake(tried, size, bytes_of=lambda size: size, seconds_of=lambda size: 1.0)

    found, _ = width._descend(prepare, 24, tried, limit=limit)
    assert found.width == expected
    assert len(tried) <= 3


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"execution.devices = 99: there are \d+"):
        run.choose_devices(ExecutionConfig(devices=99))
