"""Axes become the studies they describe; what cannot be a study is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsfl.config import ConfigError
from capsfl.sweeps.config import load_sweep
from capsfl.sweeps.points import PointError, describe, expand, group_key, plan_of, resolve, statement_of
from capsfl.sweeps.run import share_of, take_share

HOSPITALS = 6


def distinct(elements: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(elements, min_size=1, max_size=most, unique=True)


@given(
    clips=distinct(st.floats(0.01, 10), 3),
    optimizers=distinct(st.sampled_from(["sgd", "momentum", "adam"]), 3),
    seeds=distinct(st.integers(0, 1000), 3),
    draws=st.integers(1, 4),
    random=st.booleans(),
)
def test_a_sweep_is_grid_times_draws_times_seeds(configure, clips, optimizers, seeds, draws, random):
    axis = {"field": "training.local.learning_rate", "distribution": "log_uniform", "low": 1e-3, "high": 1.0}
    config = configure(
        sweep__seeds=seeds,
        sweep__draws=draws,
        sweep__random=[axis] if random else [],
        sweep__grid=[
            {"field": "privacy.clip_norm", "values": clips},
            {"field": "training.local.optimizer", "values": optimizers},
        ],
    )
    studies = expand(config)
    rates = draws if random else 1
    assert len(studies) == len(clips) * len(optimizers) * rates * len(seeds)
    assert [study.number for study in studies] == list(range(len(studies)))
    assert len({study.point.model_dump_json() for study in studies}) == len(studies)
    assert [study.point.seed for study in studies] == seeds * (len(studies) // len(seeds))
    for study in studies:
        setting = dict(study.setting)
        assert study.point.privacy.clip_norm == setting["privacy.clip_norm"]
        assert study.point.training.local.optimizer == setting["training.local.optimizer"]
        assert 1e-3 <= study.point.training.local.learning_rate <= 1.0
        assert study.point.training.rounds == 4


@given(seed=st.integers(0, 2**31 - 1), low=st.floats(-5, 4.9), width=st.floats(0.1, 5))
def test_draws_lie_within_their_bounds_and_do_not_depend_on_other_fields(configure, seed, low, width):
    own = {"field": "privacy.clip_norm", "distribution": "log_uniform", "low": 10**low, "high": 10 ** (low + width)}
    other = {"field": "training.local.epochs", "distribution": "choice", "values": [1, 2, 3]}

    def draws(axes: list, count: int) -> list[float]:
        config = configure(sweep__random=axes, sweep__draws=count, sweep__draw_seed=seed)
        return [study.point.privacy.clip_norm for study in expand(config)]

    alone = draws([own], 5)
    assert all(10**low <= value <= 10 ** (low + width) for value in alone)
    assert len(set(alone)) > 1
    assert draws([other, own], 5) == alone
    assert draws([own], 3) == alone[:3]


def test_single_points_stand_beside_the_grid(tmp_path: Path):
    path = write(tmp_path, '[sweep]\nseeds = [1, 2]\n[sweep.grid]\nprivacy.clip_norm = [0.1, 0.2]\n'
                 '[[sweep.points]]\n"privacy.clip_norm" = 3.0\ntraining.local.learning_rate = 0.7\n')  # fmt: skip
    studies = expand(load_sweep(path))
    assert [study.point.privacy.clip_norm for study in studies] == [0.1, 0.1, 0.2, 0.2, 3.0, 3.0]
    assert describe(studies[-1].setting) == "clip norm 3, learning rate 0.7"
    assert studies[-1].point.training.local.learning_rate == 0.7


def test_a_target_epsilon_is_met_by_the_noise_that_is_solved_for(configure):
    config = configure(sweep__target_epsilon=[1.5, 6.0], privacy__noise_multiplier=0.0)
    for study in expand(config):
        solved = resolve(study, num_hospitals=HOSPITALS)
        epsilon = statement_of(solved.point, num_hospitals=HOSPITALS).epsilon
        assert study.target_epsilon is not None
        assert epsilon is not None
        assert 0.98 * study.target_epsilon < epsilon <= study.target_epsilon
        # A run of its own, which knows nothing of the target, has the same.
        alone = plan_of(solved.point, num_hospitals=HOSPITALS).epsilon(solved.point.training.rounds)
        assert alone == epsilon


def test_traced_fields_share_a_group_and_static_ones_do_not(configure):
    def key(**changes: Any) -> Any:
        study = resolve(expand(configure(**changes))[0], num_hospitals=HOSPITALS)
        return group_key(study.point, num_hospitals=HOSPITALS)

    base = key()
    for change in (
        {"privacy__clip_norm": 3.0},
        {"privacy__noise_multiplier": 0.4},
        {"privacy__truncation": 5},
        {"training__local__learning_rate": 0.9},
        {"training__server": {"learning_rate": 0.5}},
        {"sweep__seeds": [7]},
    ):
        assert key(**change) == base, change
    for change in (
        {"privacy__cohort": 3},
        {"privacy__sampler": "fixed"},
        {"training__server": {"optimizer": "adam"}},
        {"training__local__epochs": 2},
        {"training__rounds": 5},
        {"problem__model": {"hidden": [5]}},
        {"privacy__clipping": "quantile"},
    ):
        assert key(**change) != base, change


@given(parts=st.integers(1, 9), sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_shares_hold_every_study_once_and_differ_by_at_most_one(parts, sizes):
    studies: list[Any] = list(range(sum(sizes)))
    groups = [studies[sum(sizes[:place]) :][:size] for place, size in enumerate(sizes)]
    shares = [[s for members in take_share(groups, part, parts) for s in members] for part in range(parts)]
    assert [study for share in shares for study in share] == studies
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("part", "environment", "expected"),
    [
        ("", {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, (0, 1)),
        ("5/8", {}, (5, 8)),
        ("auto", {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, (3, 8)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_PROCID": "0"}, (2, 4)),
        ("auto", {"JOB_COMPLETION_INDEX": "1", "CAPSFL_PARTS": "3"}, (1, 3)),
    ],
)
def test_a_process_knows_its_share(part, environment, expected):
    assert share_of(part, environment) == expected


@pytest.mark.parametrize("part", ["8/8", "auto"])
def test_a_share_that_does_not_exist_is_refused(part):
    with pytest.raises(ValueError, match=rf"execution.part = {part}: "):
        share_of(part, {})


def write(folder: Path, axes: str, **changes: str) -> Path:
    """The tiny configuration as a TOML file, with other text for its sections where given."""
    sections = {
        "problem": 'kind = "synthetic"\nhospitals = 6',
        "training": "rounds = 2",
        "privacy": "clip_norm = 0.5",
    } | changes
    path = folder / "sweep.toml"
    path.write_text("".join(f"[{name}]\n{text}\n" for name, text in sections.items()) + axes)
    return path


GRID = "[sweep.grid]\n"


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (GRID + "privacy.clip_nrom = [1.0]", "sweep: privacy.clip_nrom: unknown .*perhaps you meant privacy.clip_norm"),
        (GRID + "training.local.learning_rate = []", r"sweep.grid.training.local.learning_rate = \[\]: no values"),
        (GRID + "privacy.clip_norm = 1.0", "sweep.grid.privacy.clip_norm = 1.0: expected a list"),
        (GRID + "privacy.clip_norm = [0.5, -1.0]", "privacy.clip_norm = -1.0: .*greater than or equal to"),
        (GRID + "privacy.noise_multiplier = [-0.1]", "privacy.noise_multiplier = -0.1: .*greater than or equal to 0"),
        (GRID + 'training.rounds = ["ten"]', 'training.rounds = "ten": .*integer'),
        (GRID + "privacy.clip_norm = [1.0, 1.0]", "privacy.clip_norm: 1.0 is given twice"),
        (GRID + "problem.noise = [0.0]", "problem.noise = 0.0: .*greater than 0"),
        (GRID + 'problem.kind = ["mnist"]', "problem.kind: one sweep has one problem"),
        (GRID + "problem.seed = [1, 2]", "problem.seed: seeds are no axis; list them in sweep.seeds"),
        (GRID + "privacy.target_epsilon = [1.0]", "privacy.target_epsilon: is solved for; .*sweep.target_epsilon"),
        (GRID + "privacy.clip_norm = [inf]", "privacy.clip_norm.0 = inf: expected a finite number"),
        ("[sweep]\ntarget_epsilon = [0.0]", "sweep.target_epsilon.0 = 0.0: .*greater than 0"),
        ("[sweep]\nseeds = []", r"sweep.seeds = \[\]: .*at least 1"),
        ("[sweep]\nseeds = [1, 1]", "seeds: 1 is given twice"),
        ("[sweep]\ngrids = 1", "sweep.grids unknown key; see `capsfl sweep CONFIG --help`"),
        (
            "[sweep]\ntarget_epsilon = [1.0]\n" + GRID + "privacy.noise_multiplier = [1.0]",
            "privacy.noise_multiplier: sweep.target_epsilon solves for it",
        ),
        (
            '[sweep.random]\nprivacy.clip_norm = { distribution = "log_uniform", low = 0.0, high = 1.0 }',
            "privacy.clip_norm: log_uniform takes `low` above 0",
        ),
        (
            '[sweep.random]\nprivacy.clip_norm = { distribution = "uniform", low = 2.0, high = 1.0 }',
            "privacy.clip_norm: uniform takes `low` below `high`",
        ),
        ('[sweep.random]\nprivacy.clip_norm = { distribution = "choice" }', "privacy.clip_norm: choice takes `values`"),
        ("[sweep.random]\nprivacy.clip_norm = [1.0]", "sweep.random.privacy.clip_norm: expected"),
        ("[[sweep.points]]\nprivacy.clip_norm = 1.0\n" * 2, "clip norm 1 is listed twice"),
    ],
)
def test_an_axis_that_makes_no_study_is_refused_in_one_line(tmp_path, axes, message):
    path = write(tmp_path, axes)
    with pytest.raises((ConfigError, PointError), match=message) as refusal:
        expand(load_sweep(path))
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy__cohort": 7}, "privacy.cohort = 7: .*number of hospitals"),
        ({"training__aggregation": {"rule": "median"}}, "aggregation.rule = median: .*no epsilon would hold"),
        ({"training__scaffold": True}, "training.scaffold = true: "),
        ({"privacy__unit": "patient", "privacy__expected_patients": 2}, 'privacy.unit = patient: .*"hospital"'),
        ({"privacy__clipping": "quantile", "privacy__bit_noise": 0.2}, "bit_noise = 0.2: .*noise multiplier"),
        ({"sweep__target_epsilon": [1.0], "privacy__clipping": "median"}, "target_epsilon = 1.0: is met by Gaussian"),
    ],
)
def test_a_value_that_the_plan_refuses_names_the_study(configure, changes, message):
    study = expand(configure(**changes))[0]
    with pytest.raises(PointError, match=message) as refusal:
        resolve(study, num_hospitals=HOSPITALS)
    assert "study 0" in str(refusal.value)


def test_the_digest_covers_what_decides_results_and_nothing_else(configure):
    base = configure()
    assert configure(out="elsewhere", execution__width=7, execution__part="1/2").digest() == base.digest()
    assert configure(sweep__seeds=[1]).digest() != base.digest()
    assert json.loads(json.dumps(base.table())) == base.table()
