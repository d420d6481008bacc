"""Running statistics across hospitals: averaged or at home, on every layout, through a resume, refused under noise."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsfl.checkpoint import Step, open_checkpoints
from capsfl.federated import DevicesConfig, Federation, LocalConfig, RoundsConfig, federate, stack_hospitals
from capsfl.federated.aggregation import AggregationConfig
from capsfl.federated.robust import krum
from capsfl.federated.server import ServerConfig
from capsfl.learning.tasks import BatchNormWeights, make_task
from capsfl.models.zoo.layers import BatchNorm
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.plan import PrivacyConfig

TORTURE = os.environ.get("CAPSFL_TORTURE") == "1"
MOMENTUM = 0.8
LOCAL = LocalConfig(optimizer="sgd", learning_rate=0.05, batch_size=4, epochs=1, shuffle=False)
EVERYBODY = PrivacyConfig(clip_norm=1e6, sampler="all")


class Net(nnx.Module):
    """One normalised layer and one output."""

    def __init__(self) -> None:
        self.norm = BatchNorm("bn", 3, momentum=MOMENTUM, epsilon=1e-3)
        self.out = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.norm(x[:, None, None])[:, 0, 0])[:, 0]


def _scores(model, batch, weight):
    return {"error": (jnp.sum(weight * (model(batch["x"]) - batch["y"]) ** 2), jnp.sum(weight))}


def _error(model, batch):
    return jnp.clip(jnp.abs(model(batch["x"]) - batch["y"]), 0, 1)


@pytest.fixture(scope="module")
def task():
    def loss(model, batch):
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

    return make_task("line", Net(), loss, _scores, _error)


@pytest.fixture(scope="module")
def records():
    generator = np.random.default_rng(0)

    def draw(shift, scale, count):
        x = (shift + scale * generator.normal(size=(count, 3))).astype(np.float32)
        return {"x": x, "y": x.sum(1)}

    return {"A": draw(0.0, 1.0, 8), "B": draw(3.0, 2.0, 12), "C": draw(-2.0, 0.5, 4)}


@pytest.fixture(scope="module")
def engines(task, records):
    """Everybody in every round, one hospital after the other: by the rule, compiled once."""
    return {kind: _federation(task, records, batch_norm=kind) for kind in ("average", "local")}


def _federation(task, records, privacy=EVERYBODY, devices=None, **config):
    config = RoundsConfig(rounds=4, local=LOCAL, **config)
    devices = devices or DevicesConfig(chunk=1)
    return Federation(task, stack_hospitals(records), config=config, privacy=privacy, devices=devices, seed=3)


def _run(engine, rounds, state=None):
    state = engine.init() if state is None else state
    for _ in range(rounds):
        state, report = engine.step(state)
    return state, report


def _flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _mean(statistics):
    return np.asarray(nnx.to_pure_dict(statistics)["norm"]["mean"])


def _followed(rows, start):
    """The running mean after a hospital's batches, worked out by hand."""
    for batch in np.split(rows["x"], range(4, len(rows["x"]), 4)):
        start = MOMENTUM * start + (1 - MOMENTUM) * batch.mean(0)
    return start


def test_the_statistics_become_the_mean_of_those_that_the_hospitals_end_with(engines, records):
    state, _ = _run(engines["average"], 1)
    expected = np.mean([_followed(rows, np.zeros(3)) for rows in records.values()], axis=0)
    np.testing.assert_allclose(_mean(state.parameters.statistics), expected, rtol=1e-5)
    assert state.statistics is None


def test_the_server_optimizer_moves_the_weights_and_leaves_the_statistics_alone(task, engines, records):
    plain, _ = _run(engines["average"], 1)
    server, vmapped = ServerConfig(optimizer="adam", learning_rate=0.01), DevicesConfig(chunk=3)
    adam, _ = _run(_federation(task, records, server=server, devices=vmapped), 1)
    np.testing.assert_allclose(_flat(plain.parameters.statistics), _flat(adam.parameters.statistics), rtol=1e-5)
    assert not np.allclose(_flat(plain.parameters.trainable), _flat(adam.parameters.trainable))


def test_statistics_are_a_mean_of_those_who_came_not_a_sum_over_the_expected(task, records):
    # Of one expected hospital up to three come: divided by one, variances would come out up to three times too large.
    privacy = PrivacyConfig(clip_norm=1e6, sampler="poisson", cohort=1)
    engine = _federation(task, records, privacy=privacy)
    state, met = engine.init(), set()
    for _ in range(4):
        before = _mean(state.parameters.statistics)
        state, report = engine.step(state)
        found = [_followed(records[name], before) for name in report.cohort]
        expected = np.mean(found, axis=0) if found else before
        np.testing.assert_allclose(_mean(state.parameters.statistics), expected, rtol=1e-4, atol=1e-6)
        met.add(len(report.cohort))
    assert len(met) > 1


def test_kept_at_home_every_hospital_follows_its_own(task, engines, records):
    engine = engines["local"]
    state, _ = _run(engine, 2)
    for place, (name, rows) in enumerate(records.items()):
        own = jax.tree.map(lambda leaf, place=place: leaf[place], state.statistics)
        np.testing.assert_allclose(_mean(own), _followed(rows, _followed(rows, np.zeros(3))), rtol=1e-5)
        assert engine.weights_of(state, name).statistics["norm"]["mean"][...].shape == (3,)
    scores = engine.evaluate(state, stack_hospitals({"B": records["B"], "new": records["B"]}))
    model = task.merge(engine.weights_of(state, "B"))
    expected = float(np.mean((np.asarray(model(records["B"]["x"])) - records["B"]["y"]) ** 2))
    assert scores["B"]["error"] == pytest.approx(expected, rel=1e-5)
    shared = task.merge(state.parameters)
    assert scores["new"]["error"] == pytest.approx(
        float(np.mean((np.asarray(shared(records["B"]["x"])) - records["B"]["y"]) ** 2)), rel=1e-5
    )
    assert scores["B"]["error"] != pytest.approx(scores["new"]["error"], rel=1e-2)


@pytest.mark.torture
@pytest.mark.parametrize("kind", ["local", *(["average"] if TORTURE else [])])
def test_vmapped_scanned_and_split_over_devices_agree(task, engines, records, kind):
    scanned, _ = _run(engines[kind], 2)
    layouts = [DevicesConfig(chunk=3), *([DevicesConfig(parallel="shard_map", chunk=2)] if TORTURE else [])]
    for layout in layouts:
        state, _ = _run(_federation(task, records, devices=layout, batch_norm=kind), 2)
        np.testing.assert_allclose(_flat(state), _flat(scanned), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["average", "local"])
def test_a_resumed_run_is_the_same_bit_for_bit(engines, kind, tmp_path):
    engine = engines[kind]
    through, _ = _run(engine, 3)
    half, _ = _run(engine, 1)
    with open_checkpoints(tmp_path / "line") as checkpoints:
        checkpoints.save(Step.of(half, key=engine.key, accountant={}, ledger=b"log"))
        restored = checkpoints.restore(engine.init(), key=engine.key)
    assert restored is not None
    resumed, _ = _run(engine, 2, engine.place(restored.state))
    assert _flat(resumed).tobytes() == _flat(through).tobytes()


@pytest.mark.torture
@pytest.mark.parametrize("rule", ["krum", *(["mean", "median", "weighted", "mae_votes"] if TORTURE else [])])
def test_every_rule_covers_the_statistics_and_leaves_broken_ones_out(task, records, rule):
    several = {f"{name}{copy}": rows for name, rows in records.items() for copy in range(2)}
    broken = {"x": np.full_like(records["A"]["x"], np.nan), "y": records["A"]["y"]}
    aggregation = AggregationConfig(rule=rule, byzantine=1 if rule == "krum" else 0)
    state, report = _run(_federation(task, several | {"D": broken}, aggregation=aggregation), 1)
    assert report.not_finite == ("D",)
    assert np.isfinite(_flat(state)).all()
    ends = np.stack([_followed(rows, np.zeros(3)) for rows in several.values()])
    found = _mean(state.parameters.statistics)
    if rule in ("mean", "median"):
        np.testing.assert_allclose(found, getattr(np, rule)(ends, axis=0), rtol=1e-5)
    elif rule == "krum":
        assert np.isclose(ends, found[None], rtol=1e-5).all(1).any()
    elif rule == "weighted":
        counts = np.array([len(rows["x"]) for rows in several.values()])
        np.testing.assert_allclose(found, (counts[:, None] * ends).sum(0) / counts.sum(), rtol=1e-5)
    else:
        assert (ends.min(0) <= found).all()
        assert (found <= ends.max(0)).all()


@pytest.mark.torture
@pytest.mark.skipif(not TORTURE, reason="compiles rounds of its own; set CAPSFL_TORTURE=1")
def test_scaffold_and_the_spread_leave_statistics_out(task, records):
    state, report = _run(_federation(task, records, scaffold=True, diagnostics=True), 2)
    assert state.controls is not None
    assert jax.tree.structure(state.controls.server) == jax.tree.structure(state.parameters.trainable)
    assert not any("mean" in layer for layer in report.spread)
    assert np.isfinite(_flat(state)).all()


def test_under_noise_statistics_stay_at_home_and_nothing_but_a_clipped_update_reaches_the_server(task, records):
    noisy = PrivacyConfig(clip_norm=0.5, noise_multiplier=1e-6, sampler="all")
    with pytest.raises(PrivacyError, match=r'batch_norm = average: .*no epsilon would hold; set it to "local"'):
        _federation(task, records, privacy=noisy)
    # Records a million times larger change statistics without bound, and the server's state by no more than 2 S / m.
    huge = records | {"A": {"x": 1e6 * records["A"]["x"], "y": records["A"]["y"]}}
    engine = _federation(task, records, privacy=noisy, batch_norm="local")
    first, ends = engine.init(), []
    for engine_ in (engine, _federation(task, huge, privacy=noisy, batch_norm="local")):
        state, _ = _run(engine_, 1)
        np.testing.assert_array_equal(_flat(state.parameters.statistics), _flat(first.parameters.statistics))
        ends.append(state)
    moved = np.linalg.norm(_flat(ends[0].parameters) - _flat(ends[1].parameters))
    assert 0 < moved <= 2 * 0.5 / 3 + 1e-5
    assert np.abs(_flat(ends[1].statistics)).max() > 1e6


@pytest.mark.parametrize(
    ("kind", "aggregation", "message"),
    [
        ("average", AggregationConfig(secure=True), "no bound by which aggregation.secure could mask them"),
        ("local", AggregationConfig(rule="mae_votes"), "statistics that stay at home"),
    ],
)
def test_what_would_need_a_hospitals_own_statistics_is_refused(task, records, kind, aggregation, message):
    with pytest.raises(PrivacyError, match=message):
        _federation(task, records, batch_norm=kind, aggregation=aggregation)


@pytest.mark.torture
@pytest.mark.skipif(not TORTURE, reason="compiles rounds of its own; set CAPSFL_TORTURE=1")
def test_masked_sums_carry_the_weights_of_a_model_whose_statistics_stay_at_home(task, records):
    privacy = PrivacyConfig(clip_norm=2.0, sampler="all")
    plain, _ = _run(_federation(task, records, privacy=privacy, batch_norm="local"), 1)
    secure = AggregationConfig(secure=True)
    masked, _ = _run(_federation(task, records, privacy=privacy, batch_norm="local", aggregation=secure), 1)
    np.testing.assert_allclose(_flat(masked.parameters.trainable), _flat(plain.parameters.trainable), atol=1e-4)


def test_a_task_trains_by_the_batch_and_scores_by_the_running_statistics(task, records):
    rows = {name: jnp.asarray(array) for name, array in records["B"].items()}
    _, after = task.loss_and_statistics(task.parameters, rows)
    np.testing.assert_allclose(_mean(after), (1 - MOMENTUM) * rows["x"].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(_mean(task.parameters.statistics), np.zeros(3))
    (top, bottom) = task.scores(task.parameters, rows, jnp.ones(12))["error"]
    assert float(top / bottom) == pytest.approx(
        float(jnp.mean((task.merge(task.parameters)(rows["x"]) - rows["y"]) ** 2))
    )
    assert float(top / bottom) != pytest.approx(float(task.loss(task.parameters, rows)), rel=1e-2)


def test_a_hospital_that_was_never_drawn_works_with_the_servers_statistics(task, records):
    privacy = PrivacyConfig(clip_norm=1e6, sampler="fixed", cohort=1)
    engine = _federation(task, records, privacy=privacy, batch_norm="local")
    state, report = _run(engine, 1)
    (drawn,) = report.cohort
    for name in records:
        expected = _followed(records[drawn], np.zeros(3))
        assert np.isnan(_mean(state.statistics)[list(records).index(name)]).all() == (name != drawn)
        np.testing.assert_allclose(_mean(engine.weights_of(state, name).statistics), expected, rtol=1e-5)


def test_under_noise_a_capped_poisson_round_may_not_keep_statistics(task, records):
    privacy = PrivacyConfig(clip_norm=1.0, noise_multiplier=1.0, sampler="poisson", cohort=1, truncation=2)
    with pytest.raises(PrivacyError, match=r"batch_norm = local: .* cap of 2 hospitals .* set privacy.truncation = 3"):
        _federation(task, records, privacy=privacy, batch_norm="local")
    _federation(task, records, privacy=privacy.model_copy(update={"truncation": 3}), batch_norm="local")


def test_krum_judges_a_hospital_by_its_update_and_not_by_statistics_that_nothing_bounds():
    generator = np.random.default_rng(5)
    updates = (1 + 0.1 * generator.normal(size=(9, 20))).astype(np.float32)
    statistics = (5 * generator.normal(size=(9, 20))).astype(np.float32)
    updates[4], statistics[4] = -updates[4], np.median(statistics, axis=0)
    found = krum(BatchNormWeights(updates, statistics), jnp.ones(9, bool), byzantine=2)
    assert found.trainable.mean() > 0.5


def test_federate_refuses_a_model_whose_statistics_would_all_stay_at_home(records):
    def loss(model, batch):
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

    private = PrivacyConfig(clip_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match='batch_norm = "local": under noise'):
        federate(Net(), loss, records, rounds=RoundsConfig(batch_norm="local"), privacy=private)
