"""Robust rules, FedProx, SCAFFOLD and diagnostics inside a round, against loops written from their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsfl.federated.aggregation import AggregationConfig
from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federation import Federation, RoundsConfig
from capsfl.federated.hospitals import stack_hospitals
from capsfl.federated.local import LocalConfig
from capsfl.learning.tasks import make_task
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.plan import PrivacyConfig

CLIP = 1e6
LOCAL = LocalConfig(optimizer="sgd", learning_rate=1.0, batch_size=4)


@pytest.fixture(scope="module")
def line():
    """A loss linear in the weights: with learning rate 1 the update of a hospital is minus its mean record."""

    class Line(nnx.Module):
        def __init__(self) -> None:
            self.weights = nnx.Param(jnp.zeros(3))

    return make_task("line", Line(), lambda model, batch: -jnp.mean(batch @ model.weights[...]))


@pytest.fixture(scope="module")
def truth():
    return np.random.default_rng(0).normal(1.0, 0.1, (7, 3)).astype(np.float32)


def hospitals_of(rows):
    """One hospital a row, which is each of its four records."""
    return stack_hospitals({f"h{i}": np.broadcast_to(row, (4, *np.shape(row))).copy() for i, row in enumerate(rows)})


def engine(task, rows, *, rounds, privacy=None, chunk=None):
    return Federation(
        task,
        hospitals_of(rows),
        config=rounds,
        privacy=privacy or PrivacyConfig(clip_norm=CLIP),
        devices=DevicesConfig(chunk=chunk or 1),
    )


@pytest.fixture(scope="module")
def release(line):
    """`(rows, rule, clip_norm, **options) -> weights and report` of a round, each rule compiled once."""
    engines = {}

    def run(rows, rule, *, clip_norm=CLIP, **options):
        name = (rule, clip_norm, *options.items())
        if name not in engines:
            rounds = RoundsConfig(local=LOCAL, aggregation=AggregationConfig(rule=rule, **options))
            engines[name] = engine(line, rows, rounds=rounds, privacy=PrivacyConfig(clip_norm=clip_norm))
        federation = engines[name]
        federation.hospitals, federation._placed = hospitals_of(rows), None
        state, report = federation.step(federation.init())
        return np.asarray(jax.tree.leaves(state.parameters)[0]), report

    return run


RULES = [
    ("median", {}),
    ("trimmed_mean", {"trim": 0.3}),
    ("krum", {"byzantine": 2}),
    ("multi_krum", {"byzantine": 2, "selected": 3}),
]


@pytest.mark.parametrize(("rule", "options"), RULES)
@pytest.mark.parametrize("lie", [-1.0, 1e6, np.nan])
def test_two_liars_among_seven_move_a_robust_rule_no_further_than_the_honest_spread(release, truth, rule, options, lie):
    lied = truth.copy()
    lied[[1, 4]] *= np.float32(lie)
    honest = np.delete(truth, [1, 4], axis=0)
    found, report = release(lied, rule, **options)
    assert (found >= honest.min(0) - 1e-6).all()
    assert (found <= honest.max(0) + 1e-6).all()
    assert report.not_finite == (("h1", "h4") if np.isnan(lie) else ())


def test_two_liars_move_the_mean(release, truth):
    lied = truth.copy()
    lied[[1, 4]] *= -1
    assert (release(lied, "mean")[0] < truth.min(0)).all()


@pytest.mark.parametrize("lie", [-1.0, 1e6, -1e6, np.nan, np.inf])
def test_two_liars_move_the_mean_by_at_most_what_clipping_leaves_them(release, truth, lie):
    clip = 0.5
    lied = truth.copy()
    lied[[1, 4]] *= np.float32(lie)
    honest, _ = release(truth, "mean", clip_norm=clip)
    found, report = release(lied, "mean", clip_norm=clip)
    finite = bool(np.isfinite(lie))
    # A liar swaps an update of norm S for another one, or for none.
    assert np.linalg.norm(found - honest) <= 2 * (2 if finite else 1) * clip / 7 * (1 + 1e-5)
    assert report.not_finite == (() if finite else ("h1", "h4"))
    assert set(report.cohort) == {f"h{i}" for i in range(7)}


def test_the_weighted_mean_weighs_by_records(line):
    rows = {"small": np.full((2, 3), 1, np.float32), "large": np.full((6, 3), 5, np.float32)}
    rounds = RoundsConfig(
        local=LocalConfig(optimizer="sgd", learning_rate=1.0, batch_size=8),
        aggregation=AggregationConfig(rule="weighted"),
    )
    federation = Federation(line, stack_hospitals(rows), config=rounds, privacy=PrivacyConfig(clip_norm=CLIP))
    state, _ = federation.step(federation.init())
    np.testing.assert_allclose(jax.tree.leaves(state.parameters)[0], (2 * 1 + 6 * 5) / 8, rtol=1e-5)


@pytest.mark.parametrize("rule", ["weighted", "median", "trimmed_mean", "krum"])
def test_a_rule_without_a_sensitivity_refuses_noise_by_name(line, truth, rule):
    rounds = RoundsConfig(local=LOCAL, aggregation=AggregationConfig(rule=rule))
    with pytest.raises(PrivacyError, match=r"aggregation\.rule = .*noise_multiplier"):
        engine(line, truth, rounds=rounds, privacy=PrivacyConfig(clip_norm=1.0, noise_multiplier=1.0))


def test_krum_refuses_a_cohort_too_small_for_its_liars(line, truth):
    rounds = RoundsConfig(local=LOCAL, aggregation=AggregationConfig(rule="krum", byzantine=3))
    with pytest.raises(PrivacyError, match=r"aggregation\.byzantine = 3.*has 7"):
        engine(line, truth, rounds=rounds)


def quadratic():
    """Loss 1/2 |w - x|^2, whose gradient is w - x."""

    class Point(nnx.Module):
        def __init__(self) -> None:
            self.weights = nnx.Param(jnp.zeros(3))

    return make_task(
        "point", Point(), lambda model, batch: 0.5 * jnp.mean(jnp.sum((model.weights[...][None] - batch) ** 2, axis=-1))
    )


def test_fedprox_pulls_towards_the_server_as_its_paper_says(truth):
    rate, mu, epochs = 0.2, 0.7, 3
    local = LocalConfig(optimizer="sgd", learning_rate=rate, batch_size=4, epochs=epochs, proximal=mu)
    federation = engine(quadratic(), truth, rounds=RoundsConfig(local=local))
    state, _ = federation.step(federation.init())
    ends = []
    for x in truth:
        w = np.zeros(3)
        for _ in range(epochs):
            w = w - rate * ((w - x) + mu * w)
        ends.append(w)
    np.testing.assert_allclose(jax.tree.leaves(state.parameters)[0], np.mean(ends, 0), rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3])
def test_scaffold_keeps_its_control_variates_as_its_paper_says(truth, chunk):
    """Option II, cohorts of 3 of 7, two rounds of two local steps."""
    rate, epochs, number = 0.2, 2, len(truth)
    local = LocalConfig(optimizer="sgd", learning_rate=rate, batch_size=4, epochs=epochs)
    privacy = PrivacyConfig(clip_norm=CLIP, sampler="fixed", cohort=3)
    federation = engine(
        quadratic(), truth, rounds=RoundsConfig(local=local, scaffold=True), privacy=privacy, chunk=chunk
    )
    state = federation.init()
    w, c, own = np.zeros(3), np.zeros(3), np.zeros((number, 3))
    for _ in range(2):
        state, report = federation.step(state)
        ends, changes = [], []
        for name in report.cohort:
            h = int(name[1:])
            y = w.copy()
            for _ in range(epochs):
                y = y - rate * ((y - truth[h]) - own[h] + c)
            new = own[h] - c + (w - y) / (epochs * rate)
            ends.append(y)
            changes.append(new - own[h])
            own[h] = new
        w = np.mean(ends, 0)
        c = c + np.sum(changes, 0) / number
        assert state.controls is not None
        np.testing.assert_allclose(jax.tree.leaves(state.parameters)[0], w, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(jax.tree.leaves(state.controls.server)[0], c, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(jax.tree.leaves(state.controls.hospitals)[0], own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "noise", [{"noise_multiplier": 1.0}, {"mechanism": "laplace", "local_epsilon": 1.0, "clip_kind": "l1"}]
)
def test_scaffold_refuses_noise_by_name(truth, noise):
    rounds = RoundsConfig(local=LOCAL, scaffold=True)
    with pytest.raises(PrivacyError, match="scaffold"):
        engine(quadratic(), truth, rounds=rounds, privacy=PrivacyConfig(clip_norm=1.0, **noise))


@pytest.mark.parametrize("chunk", [1, 3])
def test_diagnostics_are_equations_10_and_11_of_the_updates_before_clipping(line, truth, chunk):
    rounds = RoundsConfig(local=LOCAL, diagnostics=True)
    federation = engine(line, truth, rounds=rounds, privacy=PrivacyConfig(clip_norm=0.01), chunk=chunk)
    _, report = federation.step(federation.init())
    (figures,) = report.spread.values()
    variance = truth.var(axis=0)
    np.testing.assert_allclose(figures["V_c"], variance.sum(), rtol=1e-4)
    np.testing.assert_allclose(figures["V_c_mean"], variance.mean(), rtol=1e-4)
    np.testing.assert_allclose(figures["U_s"], (truth.mean(0) ** 2).mean(), rtol=1e-4)


def test_quantile_clipping_finds_the_quantile_of_the_norms(line, truth):
    norms = np.linalg.norm(truth, axis=1)
    privacy = PrivacyConfig(clip_norm=0.1, clipping="quantile", clip_learning_rate=0.3, bit_noise=1e-3)
    federation = engine(line, truth, rounds=RoundsConfig(local=LOCAL), privacy=privacy)
    state = federation.init()
    for _ in range(40):
        state, report = federation.step(state)
    assert state.clip_norm is not None
    assert report.clip_norm is not None
    assert report.clip_norm != pytest.approx(0.1)
    # Four of seven at most C overshoots one half, three falls short: C settles around the fourth norm.
    assert np.sort(norms)[2] * 0.95 < float(state.clip_norm) < np.sort(norms)[4] * 1.05


def test_quantile_clipping_pays_for_its_bits_with_noise_on_the_updates(truth):
    class Wide(nnx.Module):
        def __init__(self) -> None:
            self.weights = nnx.Param(jnp.zeros(200_000))

    wide = make_task("wide", Wide(), lambda model, batch: jnp.mean(batch) + 0 * model.weights[...].sum())
    privacy = PrivacyConfig(clip_norm=0.5, noise_multiplier=2.0, clipping="quantile", bit_noise=1.25)
    federation = engine(wide, truth, rounds=RoundsConfig(local=LOCAL), privacy=privacy)
    state, _ = federation.step(federation.init())
    share = (2.0**-2 - 2.5**-2) ** -0.5
    noise = np.asarray(jax.tree.leaves(state.parameters)[0])
    assert abs(noise.std() / (share * 0.5 / 7) - 1) < 0.01


@pytest.mark.parametrize("chunk", [1, 3])
def test_median_clipping_is_geyers(line, truth, chunk):
    rows = truth * np.arange(1, 8, dtype=np.float32)[:, None]
    privacy = PrivacyConfig(clip_norm=1.0, clipping="median")
    federation = engine(line, rows, rounds=RoundsConfig(local=LOCAL), privacy=privacy, chunk=chunk)
    state, report = federation.step(federation.init())
    norms = np.linalg.norm(rows, axis=1)
    bound = np.median(norms)
    expected = (rows * np.minimum(1, bound / norms)[:, None]).mean(0)
    np.testing.assert_allclose(jax.tree.leaves(state.parameters)[0], expected, rtol=1e-5)
    assert report.clip_norm == pytest.approx(bound, rel=1e-5)
    assert federation.plan.statement(1).epsilon is None


def test_laplace_noise_lies_on_every_hospitals_own_update(truth):
    class Wide(nnx.Module):
        def __init__(self) -> None:
            self.weights = nnx.Param(jnp.zeros(200_000))

    wide = make_task("wide", Wide(), lambda model, batch: jnp.mean(batch) + 0 * model.weights[...].sum())
    privacy = PrivacyConfig(clip_norm=1.0, mechanism="laplace", local_epsilon=4.0, clip_kind="l1")
    federation = engine(wide, truth, rounds=RoundsConfig(local=LOCAL), privacy=privacy)
    state, _ = federation.step(federation.init())
    noise = np.asarray(jax.tree.leaves(state.parameters)[0])
    # Seven draws of scale 2 S / epsilon, variance 2 scale^2 each, in a mean of seven.
    assert abs(noise.std() / (np.sqrt(2 / 7) * 2 * 1.0 / 4.0) - 1) < 0.01
    assert federation.plan.epsilon(3) == 12.0
