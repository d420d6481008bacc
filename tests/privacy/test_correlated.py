"""Banded noise costs the epsilon of one Gaussian release and leaves less error in the sums over rounds."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsfl.privacy import PrivacyError
from capsfl.privacy.accounting import epsilon
from capsfl.privacy.correlated import banded_noise
from capsfl.privacy.events import SampledGaussian

ROUNDS, BANDS, TAKES = 32, 8, 4


@pytest.fixture(scope="module")
def noise():
    pytest.importorskip("jax_privacy")
    return banded_noise(rounds=ROUNDS, bands=BANDS, participations=TAKES)


def _stream(noise, deviation, width):
    like = {"w": jnp.zeros((width,))}

    def advance(state, key):
        drawn, state = noise.next(state, key=key, standard_deviation=deviation, like=like)
        return state, drawn["w"]

    return jax.lax.scan(advance, noise.init(like), jax.random.split(jax.random.key(2), ROUNDS))[1]


def test_at_equal_epsilon_the_prefix_sums_err_less_than_under_independent_noise(noise):
    multiplier = 3.0
    independent = multiplier * np.sqrt(TAKES)  # TAKES releases at this multiplier cost one at `multiplier`
    release = SampledGaussian("all", 1, 1, independent)
    assert noise.epsilon(noise_multiplier=multiplier, delta=1e-5) == pytest.approx(
        epsilon(release, rounds=TAKES, delta=1e-5), rel=1e-6
    )
    drawn = np.asarray(jax.jit(lambda: _stream(noise, multiplier, 20_000))(), np.float64)
    error = np.sqrt(np.mean(drawn.cumsum(0) ** 2))
    assert error == pytest.approx(multiplier * noise.prefix_error(), rel=0.02)
    assert error < 0.8 * independent * np.sqrt((ROUNDS + 1) / 2)


def test_the_noise_is_the_strategy_solved_for_white_noise_of_the_accounted_size(noise):
    strategy = np.sum([np.diag(np.full(ROUNDS - i, c), -i) for i, c in enumerate(noise.coefficients)], axis=0)
    white = strategy @ np.asarray(_stream(noise, 2.0, 20_000), np.float64)
    np.testing.assert_allclose(white.std(1), 2.0 * noise.sensitivity, rtol=0.03)
    columns = strategy[:, :: noise.separation][:, :TAKES].sum(1)
    assert noise.sensitivity >= np.linalg.norm(columns) * (1 - 1e-6)
    assert noise.sensitivity == pytest.approx(np.sqrt(TAKES), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"bands": 40}, "bands = 40: must lie between 1 and 32"),
        ({"bands": 4, "participations": 9}, "participations = 9: must lie between 1 and 8"),
        ({"bands": 4, "separation": 0}, "separation = 0"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(words, message):
    with pytest.raises(PrivacyError, match=message):
        banded_noise(rounds=ROUNDS, **words)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_privacy.matrix_factorization", None)
    with pytest.raises(ImportError, match=r"pip install 'capsfl\[matrix\]'"):
        banded_noise(rounds=4, bands=2)
