"""Groups in turn: every hospital comes back after as many rounds as there are groups, and pays for those rounds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsfl.checkpoint import Step, open_checkpoints
from capsfl.federated import Federation, RoundsConfig
from capsfl.federated.devices import DevicesConfig
from capsfl.federated.hospitals import stack_hospitals
from capsfl.federated.local import LocalConfig
from capsfl.learning.tasks import make_task
from capsfl.privacy import PrivacyConfig, PrivacyError, PrivacyPlan, noise_for, solve
from capsfl.privacy.accounting import epsilon
from capsfl.privacy.events import SampledGaussian
from capsfl.privacy.patient_plan import Stage

BANDED: dict[str, Any] = {
    "sampler": "cyclic",
    "cohort": 2,
    "noise": "banded",
    "clip_norm": 1.0,
    "noise_multiplier": 2.0,
}


def _plan(num_hospitals=6, **changes):
    return PrivacyPlan.build(PrivacyConfig(**(BANDED | changes)), num_hospitals=num_hospitals)


@pytest.mark.parametrize(("hospitals", "cohort", "groups"), [(6, 2, 3), (7, 3, 3), (5, 5, 1), (4, 1, 4)])
def test_each_group_is_visited_once_in_a_cycle_and_each_hospital_in_one_group(hospitals, cohort, groups):
    plan = _plan(hospitals, cohort=cohort, noise="independent")
    rounds = [plan.sample(key=jax.random.key(0), number=number) for number in range(2 * groups)]
    taken = [np.asarray(cohort.indices)[np.asarray(cohort.mask)].tolist() for cohort in rounds]
    assert sorted(hospital for group in taken[:groups] for hospital in group) == list(range(hospitals))
    assert taken[:groups] == taken[groups:]
    assert all(len(set(np.asarray(cohort.indices).tolist())) == plan.num_slots for cohort in rounds)


def test_the_cycle_goes_on_from_one_task_to_the_next():
    stages = (Stage("first", 4), Stage("second", 2))
    plan = PrivacyPlan.build(PrivacyConfig(**BANDED), num_hospitals=6, stages=stages)
    assert (plan.rounds_before("first"), plan.rounds_before("second"), plan.rounds_before("other")) == (0, 4, 0)
    # Six rounds in all, two for each hospital, in whatever task they fall.
    assert plan.epsilon(6) == epsilon(SampledGaussian("all", 6, 6, 2.0), rounds=2, delta=1e-5)
    assert plan.epsilon(7) == epsilon(SampledGaussian("all", 6, 6, 2.0), rounds=3, delta=1e-5)


def test_the_budget_buys_whole_cycles_and_cohorts():
    plan = _plan()
    assert plan.max_rounds(plan.epsilon(6) or 0.0) == 6
    solution = solve(2.0, for_="cohort", hospitals=6, delta=1e-5, sampler="cyclic", noise_multiplier=5.0, rounds=12)
    assert solution["epsilon"] <= 2.0
    larger = SampledGaussian("cyclic", 6, {1: 2, 2: 3, 3: 6}[solution["cohort"]], 5.0)
    assert epsilon(larger, rounds=12, delta=1e-5) > 2.0
    assert epsilon(SampledGaussian("cyclic", 6, 2, noise_for(2.0, PrivacyConfig(**BANDED), num_hospitals=6, rounds=9)),
                   rounds=9, delta=1e-5) == pytest.approx(2.0, rel=1e-3)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"cohort": 4}, r"privacy\.cohort = 4: 6 hospitals fall into 2 groups of at most 3; use 3"),
        ({"sampler": "poisson"}, r"privacy\.noise = banded: it is accounted for hospitals whose rounds lie apart"),
        ({"sampler": "all", "cohort": None}, r"privacy\.noise = banded: it is accounted"),
        ({"cohort": 6}, r"privacy\.noise = banded: it is accounted"),
        ({"bands": 4}, r"privacy\.bands = 4: a hospital comes back after 3 rounds"),
        ({"noise": "independent", "bands": 2}, r"privacy\.bands = 2: noise \"independent\" has no use"),
        ({"clipping": "quantile"}, r"privacy\.clipping = quantile: banded noise has one size"),
        ({"noise_key": "secret"}, r"privacy\.noise_key = secret: banded noise carries its past"),
    ],
)
def test_a_sampler_that_does_not_keep_hospitals_apart_is_refused(words, message):
    with pytest.raises(PrivacyError, match=message):
        _plan(**words)


def test_a_missing_library_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jax_privacy.matrix_factorization", None)
    with pytest.raises(PrivacyError, match=r"privacy\.noise = banded: .*pip install 'capsfl\[matrix\]'"):
        _plan()


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("jax_privacy")

    class Wide(nnx.Module):
        def __init__(self) -> None:
            self.weights = nnx.Param(jnp.zeros(20_000))

    task = make_task("wide", Wide(), lambda model, batch: jnp.mean(batch["x"]) + 0 * model.weights[...].sum())
    records = {f"h{number}": {"x": np.ones((2, 1), np.float32)} for number in range(6)}
    return Federation(
        task,
        stack_hospitals(records),
        config=RoundsConfig(rounds=6, local=LocalConfig(optimizer="sgd")),
        privacy=PrivacyConfig(**BANDED),
        devices=DevicesConfig(chunk=1),
    )


def test_the_round_adds_the_banded_noise_that_is_accounted_and_it_resumes_bit_for_bit(engine, tmp_path):
    state, models = engine.init(), []
    for number in range(6):
        if number == 3:
            with open_checkpoints(tmp_path) as checkpoints:
                checkpoints.save(Step.of(state, key=engine.fingerprint, accountant={}, ledger=b"log"))
        state, report = engine.step(state)
        assert report.cohort == (f"h{number % 3}", f"h{number % 3 + 3}")
        models.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.parameters)]))
    noise = engine.plan.correlated
    strategy = np.sum([np.diag(np.full(6 - i, c), -i) for i, c in enumerate(noise.coefficients)], axis=0)
    drawn = np.diff([np.zeros(20_000), *models], axis=0) * engine.plan.expected_cohort
    white = strategy @ drawn
    np.testing.assert_allclose(white.std(1), 2.0 * np.linalg.norm(noise.coefficients), rtol=0.03)
    assert np.abs(np.corrcoef(white) - np.eye(6)).max() < 0.04
    # The sum over rounds, which is the model, errs less than under independent noise of the same epsilon.
    assert models[-1].std() < 0.9 * 2.0 / 2 * np.sqrt(6)
    with open_checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(engine.init(), key=engine.fingerprint)
    assert restored is not None
    again = engine.place(restored.state)
    for _ in range(3):
        again, _ = engine.step(again)
    assert jax.tree.leaves(again.parameters)[0].tobytes() == jax.tree.leaves(state.parameters)[0].tobytes()
    assert jax.tree.leaves(again.noise)[0].tobytes() == jax.tree.leaves(state.noise)[0].tobytes()
