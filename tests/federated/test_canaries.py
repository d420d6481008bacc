"""The audit accepts the round that ships and refutes a broken one; what it cannot see is tested exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsfl.federated import canaries, round
from capsfl.federated.canaries import AuditConfig, audit_privacy
from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federation import Federation, RoundsConfig
from capsfl.federated.hospitals import Hospitals
from capsfl.federated.local import LocalConfig
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.plan import PrivacyConfig, PrivacyPlan

CLAIM = PrivacyConfig(clip_norm=0.5, noise_multiplier=2.3, delta=1e-5)


def clip_the_wrong_way_round(update, clip_norm):
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(update)))
    return jax.tree.map(lambda leaf: leaf * jnp.maximum(1.0, clip_norm / jnp.maximum(norm, 1e-9)), update), norm


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_round_that_ships_is_not_refuted(seed):
    found = audit_privacy(CLAIM, config=AuditConfig(seed=seed))
    assert 1.5 < found["claimed_epsilon"] <= 2.0
    assert 0 < found["lower_bound"] <= found["claimed_epsilon"] < found["ceiling"]
    assert found["verdict"] == "not refuted"


def test_a_poisson_round_is_not_refuted():
    privacy = PrivacyConfig(sampler="poisson", cohort=500, truncation=600, clip_norm=1.0, noise_multiplier=2.5)
    found = audit_privacy(privacy, config=AuditConfig(rounds=3))
    assert found["claimed_epsilon"] <= 2.0
    assert found["lower_bound"] <= found["claimed_epsilon"]
    assert found["cohort"] == 500


def test_dropped_noise_is_refuted(monkeypatch):
    whole = round.mean_with_noise

    def drop_noise(total, *, noise_multiplier, **settings):
        return whole(total, noise_multiplier=0.0 * noise_multiplier, **settings)

    monkeypatch.setattr(round, "mean_with_noise", drop_noise)
    found = audit_privacy(CLAIM)
    assert found["verdict"] == "refuted"
    assert found["right"] == found["guesses"] == 1000
    assert found["lower_bound"] == found["ceiling"] > 5.0


def test_clipping_the_wrong_way_round_is_refuted(monkeypatch):
    norms = [float(clip_the_wrong_way_round([jnp.asarray([n])], 1.0)[0][0][0]) for n in (0.1, 0.5, 1, 2, 50)]
    assert norms == pytest.approx([1, 1, 1, 2, 50])
    monkeypatch.setattr(round, "clip_by_global_norm", clip_the_wrong_way_round)
    found = audit_privacy(CLAIM)
    assert found["verdict"] == "refuted"
    assert found["lower_bound"] > found["claimed_epsilon"]


def test_a_claim_above_the_ceiling_is_called_out_of_reach():
    found = audit_privacy(PrivacyConfig(clip_norm=1.0, noise_multiplier=0.5))
    assert found["ceiling"] < found["claimed_epsilon"]
    assert found["verdict"] == "blunt"


def released_mean(present, *, noise_multiplier=0.0, dimension=64, directions=None, hospitals=8):
    """The model after one round over a population of which only some hospitals have records."""
    directions = np.eye(hospitals, dimension) if directions is None else directions
    engine = Federation(
        canaries._follow_directions(dimension),
        Hospitals(
            tuple(str(index) for index in range(hospitals)),
            {"direction": np.asarray(directions, np.float32)[:, None, :]},
            np.asarray(present, np.int32),
        ),
        config=RoundsConfig(local=LocalConfig(optimizer="sgd", learning_rate=1.0, batch_size=1)),
        privacy=PrivacyConfig(clip_norm=0.5, noise_multiplier=noise_multiplier),
        devices=DevicesConfig(chunk=4),
    )
    return np.asarray(engine.step(engine.init())[0].parameters["weights"])


@pytest.mark.parametrize("others", [0, 1, 6])
@pytest.mark.parametrize("norm", [0.1, 0.5, 50.0])
def test_adding_a_hospital_moves_the_released_mean_by_its_clipped_update_over_the_fixed_m(others, norm):
    directions = norm * np.eye(8, 64)
    without = np.arange(8) < others
    # All along one direction, where a divisor that followed the cohort would move everybody's share as well.
    for rows in (directions, np.broadcast_to(directions[:1], directions.shape)):
        moved = released_mean(without | (np.arange(8) == 7), directions=rows) - released_mean(without, directions=rows)
        assert np.linalg.norm(moved) == pytest.approx(min(norm, 0.5) / 8, rel=1e-5)


@pytest.mark.parametrize("present", [0, 3, 8])
def test_the_noise_is_zs_over_the_fixed_m_whoever_takes_part(present):
    dimension, directions = 200_000, np.zeros((8, 200_000))
    noise = released_mean(np.arange(8) < present, noise_multiplier=2.0, dimension=dimension, directions=directions)
    assert noise.std() == pytest.approx(2.0 * 0.5 / 8, rel=0.01)


def test_the_exact_test_sees_a_divisor_that_follows_the_cohort(monkeypatch):
    released = []
    for count in (1, 2):
        monkeypatch.setattr(PrivacyPlan, "expected_cohort", property(lambda _, count=count: float(count)))
        released.append(released_mean(np.arange(8) < count))
    assert np.linalg.norm(released[1] - released[0]) > 2 * 0.5 / 8


@pytest.mark.parametrize(
    ("field", "privacy", "config"),
    [
        ("privacy.noise_multiplier", PrivacyConfig(clip_norm=1.0), AuditConfig()),
        (
            "privacy.sampler",
            PrivacyConfig(sampler="fixed", cohort=10, clip_norm=1.0, noise_multiplier=1.0),
            AuditConfig(),
        ),
        ("audit.dimension", CLAIM, AuditConfig(canaries=2000, dimension=1500)),
    ],
)
def test_what_cannot_be_audited_is_named(field, privacy, config):
    with pytest.raises(PrivacyError, match=f"^{field} = "):
        audit_privacy(privacy, config=config)
