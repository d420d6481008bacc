"""Local Laplace noise: the scale follows the L1 bound, and L2 clipping is refused with its arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from capsfl.privacy import PrivacyConfig, PrivacyError, PrivacyPlan
from capsfl.privacy.laplace import clip_by_l1_norm, release_laplace


@pytest.mark.parametrize(("norm", "expected"), [(0.5, 0.5), (1.0, 1.0), (7.0, 1.0)])
def test_the_l1_norm_of_the_whole_tree_is_bounded(norm, expected):
    update = {"a": jnp.full((2, 2), norm / 8), "b": jnp.full((4,), -norm / 8)}
    clipped, measured = clip_by_l1_norm(update, 1.0)
    assert float(measured) == pytest.approx(norm)
    assert sum(float(jnp.abs(leaf).sum()) for leaf in clipped.values()) == pytest.approx(expected, rel=1e-6)


def test_the_noise_is_laplace_of_scale_two_s_over_epsilon():
    zeros = {"a": jnp.zeros((50_000,)), "b": jnp.zeros((50_000,))}
    released, _ = release_laplace(zeros, key=jax.random.key(1), clip_norm=0.5, local_epsilon=4.0)
    assert stats.kstest(np.concatenate([released["a"], released["b"]]), stats.laplace(scale=0.25).cdf).pvalue > 1e-4
    assert abs(np.corrcoef(released["a"], released["b"])[0, 1]) < 4.5 / np.sqrt(50_000)


def test_an_update_that_is_not_finite_is_released_as_noise():
    released, norm = release_laplace(jnp.array([jnp.nan, 1.0]), key=jax.random.key(0), clip_norm=1.0, local_epsilon=1.0)
    assert bool(jnp.isfinite(released).all())
    assert not np.isfinite(norm)


def _plan(**words):
    config = PrivacyConfig(
        **({"clip_norm": 1.0, "mechanism": "laplace", "local_epsilon": 1.0, "clip_kind": "l1"} | words)
    )
    return PrivacyPlan.build(config, num_hospitals=10)


def test_releases_add_up_at_delta_zero():
    statement = _plan(local_epsilon=0.5).statement(6)
    assert (statement.epsilon, statement.delta) == (3.0, 0.0)
    assert (statement.relation, statement.unit) == ("replace_one", "hospital")
    assert _plan(local_epsilon=0.5).max_rounds(2.2) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"clip_kind": "l2"}, r"privacy\.clip_kind = l2: .*2 S sqrt\(d\).* scale 2000 against .* rms 0\.001"),
        ({"local_epsilon": None}, r"privacy\.local_epsilon = None: .*needs the epsilon"),
        ({"noise_multiplier": 1.0}, r"privacy\.noise_multiplier = 1\.0: .*no Gaussian noise"),
        ({"clipping": "median"}, r"privacy\.clipping = median"),
        ({"mechanism": "gaussian"}, r"privacy\.local_epsilon = 1\.0: only mechanism"),
        ({"mechanism": "gaussian", "local_epsilon": None}, r"privacy\.clip_kind = l1"),
        ({"bit_noise": 1.0}, r"privacy\.bit_noise = 1\.0"),
    ],
)
def test_a_mechanism_that_does_not_fit_is_refused(words, message):
    with pytest.raises(PrivacyError, match=message):
        _plan(**words)
