"""A round is the mechanism it says it is, however its cohort is cut into chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from capsfl.federated.aggregation import AggregationConfig
from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federate import federate
from capsfl.federated.federation import Federation, RoundsConfig
from capsfl.federated.hospitals import pool_hospitals, stack_hospitals
from capsfl.federated.local import LocalConfig
from capsfl.federated.server import ServerConfig
from capsfl.learning.tasks import make_task
from capsfl.privacy.plan import PrivacyConfig

LOCAL = LocalConfig(optimizer="sgd", learning_rate=0.1, batch_size=8)


def federation(task, records, *, privacy=None, devices=None, rounds=None, seed=0):
    return Federation(
        task,
        stack_hospitals(records),
        config=rounds or RoundsConfig(local=LOCAL),
        privacy=privacy or PrivacyConfig(clip_norm=100.0),
        devices=devices or DevicesConfig(chunk=1),
        seed=seed,
    )


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_one_step_of_one_full_batch_is_the_mean_of_gradient_steps(task, records):
    same = {name: {k: v[:8] for k, v in rows.items()} for name, rows in records.items()}
    state, _ = federation(task, same).step(federation(task, same).init())
    steps = [jax.grad(task.loss)(task.parameters, rows) for rows in same.values()]
    expected = flat(task.parameters) - 0.1 * np.mean([flat(g) for g in steps], axis=0)
    np.testing.assert_allclose(flat(state.parameters), expected, atol=1e-6)


@pytest.mark.parametrize("chunk", [2, 3, 5])
def test_the_result_does_not_depend_on_the_chunk(task, records, chunk):
    one = federation(task, records, devices=DevicesConfig(chunk=1))
    many = federation(task, records, devices=DevicesConfig(chunk=chunk))
    first, _ = one.step(one.init())
    second, _ = many.step(many.init())
    np.testing.assert_allclose(flat(first.parameters), flat(second.parameters), atol=1e-6)


def test_a_round_run_again_is_bit_identical(task, records):
    engine = federation(task, records, privacy=PrivacyConfig(clip_norm=1.0, noise_multiplier=0.5))
    state = engine.init()
    for _ in range(2):
        state, _ = engine.step(state)
    again, _ = engine.step(state)
    fresh = federation(task, records, privacy=PrivacyConfig(clip_norm=1.0, noise_multiplier=0.5))
    other, _ = fresh.step(fresh.place(jax.tree.map(np.asarray, state)))
    assert flat(again.parameters).tobytes() == flat(other.parameters).tobytes()


def test_one_hospital_moves_the_released_model_by_at_most_the_clip_norm_over_the_cohort(task, records):
    clip = 0.01
    wild = {name: dict(rows) for name, rows in records.items()}
    wild["C"] = {"x": records["C"]["x"], "y": 1000 + records["C"]["y"]}
    engines = [federation(task, rows, privacy=PrivacyConfig(clip_norm=clip)) for rows in (records, wild)]
    released = [flat(engine.step(engine.init())[0].parameters) for engine in engines]
    # Replacing a hospital moves the mean by at most 2 S / m.
    assert 0 < np.linalg.norm(released[0] - released[1]) <= 2 * clip / 5 * (1 + 1e-4)


def test_noise_has_the_stated_deviation_and_changes_every_round(records):
    class Wide(nnx.Module):
        def __init__(self) -> None:
            self.weights = nnx.Param(jnp.zeros(200_000))

    wide = make_task("wide", Wide(), lambda model, batch: jnp.mean(batch["y"]) + 0 * model.weights[...].sum())
    privacy = PrivacyConfig(clip_norm=0.5, noise_multiplier=2.0)
    engine = federation(wide, records, privacy=privacy)
    first, _ = engine.step(engine.init())
    second, _ = engine.step(first)
    noise = [flat(first.parameters), flat(second.parameters) - flat(first.parameters)]
    for draw in noise:
        assert abs(draw.std() / (2.0 * 0.5 / 5) - 1) < 0.01
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.01


def test_a_hospital_with_nan_is_named_and_adds_nothing(task, records):
    broken = {name: dict(rows) for name, rows in records.items()}
    broken["B"] = {"x": records["B"]["x"], "y": np.full_like(records["B"]["y"], np.nan)}
    engine = federation(task, broken)
    state, report = engine.step(engine.init())
    assert report.not_finite == ("B",)
    assert np.isfinite(flat(state.parameters)).all()


def test_an_empty_poisson_cohort_leaves_the_model_where_it_was(task, records):
    engine = federation(task, records, privacy=PrivacyConfig(sampler="poisson", cohort=1, clip_norm=1.0))
    state = engine.init()
    seen = []
    for _ in range(12):
        before = flat(state.parameters)
        state, report = engine.step(state)
        seen.append(len(report.cohort))
        assert (np.array_equal(before, flat(state.parameters))) == (not report.cohort)
    assert 0 in seen
    assert max(seen) > 0


def test_a_secure_run_over_poisson_cohorts_with_dropouts_is_the_plain_one_and_names_who_is_missing(task, records):
    def run(secure: bool):
        aggregation = AggregationConfig(secure=secure, secure_neighbours=2 if secure else None, dropout=0.4)
        engine = federation(
            task,
            records,
            privacy=PrivacyConfig(sampler="poisson", cohort=3, clip_norm=0.5, noise_multiplier=0.1),
            rounds=RoundsConfig(local=LOCAL, aggregation=aggregation),
        )
        # The two draw their noise apart, as rounds of any two configurations do; here they are to be compared.
        engine.key = jax.random.key(5)
        state, reports = engine.init(), []
        for _ in range(4):
            state, report = engine.step(state)
            reports.append((report.cohort, report.dropped))
        return flat(state.parameters), reports

    plain, named = run(secure=False)
    masked, same = run(secure=True)
    assert same == named
    assert any(dropped for _, dropped in named)
    assert all(set(dropped) <= set(cohort) for cohort, dropped in named)
    np.testing.assert_allclose(masked, plain, atol=1e-4)
    assert not np.array_equal(masked, plain)


def test_fixed_cohorts_have_their_size_and_vary(task, records):
    engine = federation(task, records, privacy=PrivacyConfig(sampler="fixed", cohort=2, clip_norm=1.0))
    state, cohorts = engine.init(), set()
    for _ in range(6):
        state, report = engine.step(state)
        assert len(set(report.cohort)) == 2
        cohorts.add(report.cohort)
    assert len(cohorts) > 1


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "yogi", "adagrad"])
def test_every_server_optimizer_lowers_the_loss(task, records, optimizer):
    rounds = RoundsConfig(
        local=LOCAL,
        server=ServerConfig(optimizer=optimizer, learning_rate=1.0 if optimizer == "sgd" else 0.1),
    )
    engine = federation(task, records, rounds=rounds)
    state = engine.init()
    losses = []
    for _ in range(6):
        state, report = engine.step(state)
        losses.append(report.loss)
    assert losses[-1] < losses[0]


def test_a_full_pass_reads_every_record_exactly_once_when_batches_divide(records):
    """With a loss linear in the weights, the update of one epoch is the sum over batches, whatever the order."""

    class Line(nnx.Module):
        def __init__(self) -> None:
            self.weights = nnx.Param(jnp.zeros(4))

    task = make_task("line", Line(), lambda model, batch: jnp.mean(batch["x"] @ model.weights[...]))
    rows = {"A": {"x": records["B"]["x"]}}
    engine = federation(task, rows)
    state, _ = engine.step(engine.init())
    expected = -0.1 * rows["A"]["x"].reshape(5, 8, 4).mean(1).sum(0)
    np.testing.assert_allclose(flat(state.parameters), expected, rtol=1e-4, atol=1e-6)


def test_scores_count_real_records_only(task, records):
    engine = federation(task, records)
    scores = engine.evaluate(task.parameters, stack_hospitals(records), batch_size=7)
    model = task.merge(task.parameters)
    for name, rows in records.items():
        expected = float(jnp.mean((model(rows["x"]) - rows["y"]) ** 2))
        assert scores[name]["error"] == pytest.approx(expected, rel=1e-5)


def test_federate_trains_somebodys_model_and_states_its_privacy(net, records):
    def squared_error(model, batch):
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

    result = federate(
        net, squared_error, records,
        rounds=RoundsConfig(rounds=4, local=LOCAL),
        privacy=PrivacyConfig(clip_norm=1.0, noise_multiplier=0.3),
    )  # fmt: skip
    assert len(result.history) == 4
    assert result.privacy.epsilon is not None
    assert result.privacy.unit == "hospital"
    before = float(squared_error(net, records["B"]))
    assert float(squared_error(result.model, records["B"])) != before


def test_training_stops_at_the_budget(task, net, records):
    privacy = PrivacyConfig(clip_norm=1.0, noise_multiplier=3.0, target_epsilon=6.0)
    result = federate(
        net, lambda model, batch: jnp.mean(model(batch["x"])), records,
        rounds=RoundsConfig(rounds=50, local=LOCAL), privacy=privacy,
    )  # fmt: skip
    assert 0 < len(result.history) < 50
    assert result.privacy.epsilon is not None
    assert result.privacy.epsilon <= 6.0


def test_pooled_records_train_like_one_hospital(task, records):
    pooled = pool_hospitals(stack_hospitals(records))
    engine = Federation(task, pooled, config=RoundsConfig(local=LOCAL), privacy=PrivacyConfig(clip_norm=9.0))
    _, report = engine.step(engine.init())
    assert report.cohort == ("pooled",)


def test_optax_state_crosses_rounds_as_a_pytree(task, records):
    engine = federation(task, records, rounds=RoundsConfig(local=LOCAL, server=ServerConfig(optimizer="adam")))
    state = engine.init()
    assert isinstance(state.server, tuple)
    after, _ = engine.step(state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert optax.tree.norm(after.parameters) != optax.tree.norm(state.parameters)
