"""Hospitals vote on each other's models by mean absolute error (Eq 17 and 18), and liars are out-voted."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfl.federated.aggregation import AggregationConfig, make_rule, make_voting_rule
from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federation import Federation, RoundReport, RoundsConfig
from capsfl.federated.hospitals import stack_hospitals
from capsfl.federated.local import LocalConfig, LocalResult
from capsfl.federated.round import CohortRecords, RoundState, Setting, make_round
from capsfl.federated.server import ServerConfig, make_server_optimizer
from capsfl.federated.votes import VotingRule, weigh
from capsfl.learning.classification import ClassificationConfig, make_classification_task
from capsfl.learning.segmentation import SegmentationConfig, make_segmentation_task
from capsfl.learning.tasks import make_task
from capsfl.models.capsnet import CapsNetConfig
from capsfl.models.segcaps import SegCapsConfig
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.plan import PrivacyConfig, PrivacyPlan

NAMES = "ABCDE"
RATE = 0.5


class Line(nnx.Module):
    """A score from 0 to 1 that grows along the weights."""

    def __init__(self) -> None:
        self.weights = nnx.Param(jnp.zeros(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        return 0.5 + x @ self.weights[...]


def line_task(*, votes: bool = True):
    """Least squares times the record's `lie`, so that a hospital can hand over any multiple of its honest update."""

    def loss(model: Any, batch: Any) -> jax.Array:
        return 0.5 * jnp.mean((model(batch["x"]) - batch["y"]) ** 2) * jnp.mean(batch["lie"])

    def error(model: Any, batch: Any) -> jax.Array:
        return jnp.abs(model(batch["x"]) - batch["y"])

    return make_task("line", Line(), loss, absolute_error=error if votes else None)


def hospitals(lies: dict[str, str | float] | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Five hospitals of 32 records each; a lie is a factor on the update, or flipped labels."""
    generator = np.random.default_rng(2)
    direction = np.array([0.2, -0.1, 0.15, -0.25])
    found = {}
    for name in NAMES:
        x = generator.normal(size=(32, 4)).astype(np.float32)
        y = np.clip(0.5 + x @ direction + 0.1 * generator.normal(size=32), 0, 1).astype(np.float32)
        lie = (lies or {}).get(name, 1.0)
        if lie == "labels":
            y, lie = 1 - y, 1.0
        found[name] = {"x": x, "y": y, "lie": np.full(32, lie, np.float32)}
    return found


@cache
def voting_federation(byzantine: int, rule: str = "mae_votes", clip_norm: float = 100.0, dropout: float = 0.0):
    options = {"byzantine": byzantine} if rule == "mae_votes" else {}
    return Federation(
        line_task(),
        stack_hospitals(hospitals()),
        config=RoundsConfig(
            rounds=6,
            local=LocalConfig(optimizer="sgd", learning_rate=RATE, batch_size=32),
            aggregation=AggregationConfig.model_validate({"rule": rule, "dropout": dropout, **options}),
        ),
        privacy=PrivacyConfig(clip_norm=clip_norm),
        devices=DevicesConfig(chunk=1),
    )


def train(records: Any, rounds: int = 6, **options: Any) -> tuple[np.ndarray, list[RoundReport]]:
    """The weights and the reports after some rounds; one compiled program serves all records of one shape."""
    federation = voting_federation(**options)
    federation.hospitals, federation._placed = stack_hospitals(records), None
    state, reports = federation.init(), []
    for _ in range(rounds):
        state, report = federation.step(state)
        reports.append(report)
    return np.asarray(jax.tree.leaves(state.parameters)[0]), reports


def error_of(weights: np.ndarray, rows: dict[str, np.ndarray]) -> float:
    return float(np.abs(0.5 + rows["x"] @ weights - rows["y"]).clip(0, 1).mean())


def total_error(weights: np.ndarray) -> float:
    return float(np.mean([error_of(weights, rows) for rows in hospitals().values()]))


@pytest.mark.parametrize("lie", ["labels", -1.0, 1e6, float("nan")])
def test_a_poisoned_hospital_among_five_is_out_voted_in_every_round(lie):
    weights, reports = train(hospitals({"C": lie}), byzantine=1)
    for report in reports:
        assert "C" not in report.vote_weights
        assert sum(report.vote_weights.values()) == pytest.approx(1, abs=1e-6)
        # A NaN is no model to be out-voted, so the vote falls on an honest one as well.
        assert len(report.vote_weights) == (3 if "C" in report.not_finite else 4)
    assert total_error(weights) < 0.5 * total_error(np.zeros(4))


@pytest.mark.parametrize("lie", ["labels", -1.0, 1e6])
def test_the_same_liar_does_harm_under_the_mean(lie):
    honest, _ = train(hospitals(), byzantine=0, rule="mean", clip_norm=1e9)
    lied, _ = train(hospitals({"C": lie}), byzantine=0, rule="mean", clip_norm=1e9)
    voted, _ = train(hospitals({"C": lie}), byzantine=1)
    assert total_error(lied) > total_error(voted)
    assert total_error(lied) > total_error(honest)


def test_votes_and_weights_are_equations_17_and_18_of_the_clipped_updates():
    # D overshoots, so that single records are wrong by more than 1 and count as 1.
    records = hospitals({"B": float("nan"), "D": 30.0})
    _, (report,) = train(records, rounds=1, byzantine=0)
    models = {}
    for name in "ACDE":
        x, y = records[name]["x"], records[name]["y"]
        models[name] = RATE * records[name]["lie"][0] * (x * (y - 0.5)[:, None]).mean(0)
    expected = {
        voter: {name: error_of(model, records[voter]) for name, model in models.items() if name != voter}
        for voter in NAMES
    }
    assert report.votes.keys() == expected.keys()
    for voter, row in expected.items():
        assert report.votes[voter] == pytest.approx(row, abs=5.1e-5)  # votes have four decimals
    own = {name: np.median([expected[voter][name] for voter in NAMES if voter != name]) for name in models}
    figures = {name: 1 / (own[name] + np.mean(list(own.values()))) for name in models}
    shares = {name: figure / sum(figures.values()) for name, figure in figures.items()}
    assert report.vote_weights == pytest.approx(shares, rel=5e-4)
    assert report.not_finite == ("B",)


def test_those_who_drop_out_neither_vote_nor_count():
    _, reports = train(hospitals(), byzantine=0, dropout=0.4)
    dropped = {name for report in reports for name in report.dropped}
    assert dropped
    for report in reports:
        there = set(report.cohort) - set(report.dropped)
        assert report.vote_weights.keys() == there
        assert report.votes.keys() == (there if len(there) > 1 else set())
        assert all(row.keys() == there - {voter} for voter, row in report.votes.items())


def loop(votes: np.ndarray, usable: np.ndarray, byzantine: int, gamma: float) -> np.ndarray:
    """Eq 17, 18 and the weights, one model after the other."""
    there = [j for j in range(len(usable)) if usable[j]]
    own = {}
    for j in there:
        cast = [min(max(float(row[j]), 0.0), 1.0) for row in votes if np.isfinite(row[j])]
        own[j] = float(np.median(cast)) if cast else 1.0
    figures = {j: gamma * own[j] + sum(own.values()) / len(there) for j in there}
    kept = [j for j in there if own[j] <= sorted(own.values())[-1 - byzantine] + 1e-9]
    shares = np.zeros(len(usable))
    for j in kept:
        shares[j] = 1 / max(figures[j], 1e-6)
    return shares / shares.sum()


compiled_weigh: Any = jax.jit(weigh, static_argnames=("byzantine",))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    usable=st.lists(st.booleans(), min_size=7, max_size=7).filter(lambda mask: sum(mask) >= 4),
    missing=st.floats(0, 0.6),
    byzantine=st.integers(0, 1),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 20.0]),
)
def test_weights_agree_with_a_loop_written_from_the_equations(seed, usable, missing, byzantine, gamma):
    generator = np.random.default_rng(seed)
    votes = np.round(generator.uniform(-0.2, 1.3, (7, 7)), 4).astype(np.float32)
    votes[generator.random((7, 7)) < missing] = np.nan
    np.fill_diagonal(votes, np.nan)
    mask = np.array(usable)
    found = np.asarray(compiled_weigh(votes, mask, byzantine=byzantine, gamma=gamma))
    expected = loop(votes, mask, byzantine, gamma)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    liars=st.sets(st.integers(0, 5), min_size=2, max_size=2),
    false=st.sampled_from([0.0, 1.0, np.nan, -np.inf, 1e30]),
)
def test_two_liars_of_six_decide_no_ones_weight_by_their_votes(seed, liars, false):
    generator = np.random.default_rng(seed)
    votes = generator.uniform(0.2, 0.4, (6, 6)).astype(np.float32)
    votes[:, sorted(liars)] = generator.uniform(0.6, 0.9, (6, 2))
    for liar in liars:
        # Its friends are perfect, everybody else gets the false vote.
        votes[liar] = false
        votes[liar, sorted(liars)] = 0
    np.fill_diagonal(votes, np.nan)
    shares = np.asarray(compiled_weigh(votes, np.ones(6, bool), byzantine=2, gamma=1.0))
    assert shares[sorted(liars)].tolist() == [0, 0]
    honest = np.delete(shares, sorted(liars))
    # Every honest figure stays within those that honest votes alone could give, so shares differ by at most that.
    assert honest.max() / honest.min() <= (0.4 + 0.9) / (0.2 + 0.2)


def test_votes_do_not_depend_on_chunks_or_devices():
    records = {name: jnp.stack([jnp.asarray(rows[name][:24]) for rows in hospitals().values()]) for name in ("x", "y")}
    counts = np.array([24, 10, 0, 17, 24], np.int32)

    def pad(leaf: Any) -> Any:
        return jnp.pad(leaf, [(0, 1)] + [(0, 0)] * (leaf.ndim - 1))

    def hand_in(parameters, records, count, *, key, learning_rate, drift=None):
        row = jnp.where(count > 0, records["x"][0] * records["y"][:4].sum(), 0)
        return LocalResult({"w": row}, jnp.float32(0), jnp.int32(1))

    def error(parameters, batch):
        return jnp.abs(jax.nn.sigmoid(batch["x"] @ parameters["w"]) - batch["y"])

    plan = PrivacyPlan.build(PrivacyConfig(clip_norm=3.0), num_hospitals=5)
    cohort: Any = (jax.tree.map(pad, records), pad(jnp.asarray(counts)), pad(jnp.arange(5)))
    setting = Setting(*(jnp.float32(value) for value in (3.0, 0.0, 1.0, 1.0)))
    start: Any = {"w": jnp.zeros(4)}
    state = RoundState(start, make_server_optimizer(ServerConfig()).init(start), jnp.int32(0))

    def run(chunk: int, devices: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        body = make_round(
            hand_in,
            lambda rate: make_server_optimizer(ServerConfig(), rate),
            plan,
            chunk=chunk,
            axis_name="hospitals",
            voting=VotingRule(error, batch_size=8, byzantine=1),
        )
        split = jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), CohortRecords(*cohort))
        over = jax.jit(jax.vmap(body, in_axes=(None, 0, None, None), axis_name="hospitals"))
        after, metrics = over(state, split, setting, jax.random.key(0))
        return tuple(np.asarray(leaf)[0] for leaf in (after.parameters["w"], *metrics.votes))

    weights, errors, shares = run(3, 2)
    assert np.isnan(errors).sum() == 36 - 4 * 3
    assert (shares > 0).sum() == 3
    for found, expected in zip(run(1, 1), (weights, errors, shares), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_both_stages_of_a_study_have_an_absolute_error_of_each_record():
    model = SegCapsConfig(width=0.125, num_iters=1, reconstruction=False)
    segmentation = make_segmentation_task(SegmentationConfig(crop=16, model=model), seed=0)
    slices = {"image": np.zeros((2, 16, 16, 1), np.float32), "truth": np.ones((2, 16, 16), np.float32)}
    assert segmentation.absolute_error is not None
    assert jax.eval_shape(segmentation.absolute_error, segmentation.parameters, slices).shape == (2,)
    classification = make_classification_task(ClassificationConfig(model=CapsNetConfig.ct(image_size=32)), seed=0)
    images = {"image": np.zeros((3, 32, 32, 1), np.float32), "label": np.array([0, 1, 1])}
    assert classification.absolute_error is not None
    errors = jax.jit(classification.absolute_error)(classification.parameters, images)
    # An empty image gives the same lengths whatever its label, and two classes differ in which length should be 1.
    assert errors.shape == (3,)
    assert errors[1] == errors[2]
    assert float(errors[0] + errors[1]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("field", "aggregation", "privacy"),
    [
        ("aggregation.rule = mae_votes", {}, {"noise_multiplier": 1.0}),
        ("aggregation.rule = mae_votes", {}, {"mechanism": "laplace", "local_epsilon": 1.0, "clip_kind": "l1"}),
        ("aggregation.byzantine = 2", {"byzantine": 2}, {}),
        ("aggregation.gamma = 2.0", {"rule": "mean", "gamma": 2.0}, {}),
        ("aggregation.byzantine = 1", {"rule": "median", "byzantine": 1}, {}),
        ("aggregation.trim = 0.2", {"trim": 0.2}, {}),
    ],
)
def test_what_votes_cannot_do_is_refused_by_name(field, aggregation, privacy):
    plan = PrivacyPlan.build(PrivacyConfig(clip_norm=1.0, **privacy), num_hospitals=5)
    config = AggregationConfig.model_validate({"rule": "mae_votes"} | aggregation)
    with pytest.raises(PrivacyError, match=f"^{field}: "):
        make_voting_rule(config, plan, line_task()) if make_rule(config, plan) is None else None


def test_a_task_without_an_absolute_error_is_refused_by_name():
    plan = PrivacyPlan.build(PrivacyConfig(clip_norm=1.0), num_hospitals=5)
    with pytest.raises(PrivacyError, match=r'^aggregation\.rule = mae_votes: task "line" has no absolute error'):
        make_voting_rule(AggregationConfig(rule="mae_votes"), plan, line_task(votes=False))
