"""Noise that partly cancels between rounds: banded matrix factorization, through jax-privacy.

    noise of round t = z S sens(C) (C^-1 xi)_t,    xi_t ~ N(0, I),    C lower triangular, Toeplitz, `bands` wide

The sum over rounds is what a model is made of, and its error is smaller than under independent noise of the same
epsilon. The T rounds together are one Gaussian release with noise multiplier z if no hospital takes part more than
`participations` times, nor twice within `separation` rounds; sens(C) is the norm of the worst such pattern. Who takes
part must keep that promise: random samplers do not, and no amplification by sampling is claimed.

A plan asks for one participation. Rounds at least `bands` apart touch different rows of C, so a hospital that takes
part k times costs what k independent releases at z cost, however many rounds follow: z keeps its meaning, and the
accountant of the cyclic sampler needs to know nothing of the bands.

Sources: Choquette-Choo et al. 2023 (arXiv:2306.08153); sensitivity, Kalinin and Lampert 2024 (arXiv:2405.13763,
Theorem 2). The optional extra `capsfl[matrix]`.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from capsfl.privacy import accounting
from capsfl.privacy.events import PrivacyError, SampledGaussian


@dataclass(frozen=True)
class BandedNoise:
    """A banded strategy and its sensitivity; build it with `banded_noise`. It hashes.

    Attributes:
        coefficients: of the Toeplitz matrix C, the diagonal first; L2 norm 1.
        rounds: T, after which the guarantee ends.
        participations: k, the most rounds a hospital takes part in.
        separation: b, the least distance between two of them; 1 allows consecutive rounds.
        sensitivity: sens(C), in units of S.
    """

    coefficients: tuple[float, ...]
    rounds: int
    participations: int
    separation: int
    sensitivity: float

    def init(self, tree: Any) -> Any:
        """Returns the state before the first round, `(bands - 1)` trees of zeros; a round carries it."""
        return self._streaming().init_multiply(tree)

    def next(self, state: Any, *, key: Array, standard_deviation: ArrayLike, like: Any) -> tuple[Any, Any]:
        """Returns a round's noise on the SUM of updates, and the state of the next round.

        Args:
            state: of `init` or of the round before.
            key: used for nothing else, new in every round.
            standard_deviation: zS, a float or a traced scalar; the same in every round. The factor sens(C) is
                applied here.
            like: a tree of the shapes and dtypes of the noise.
        """
        from capsfl.privacy.mechanisms import add_gaussian

        deviation = jnp.asarray(standard_deviation, jnp.float32) * self.sensitivity
        fresh = add_gaussian(jax.tree.map(jnp.zeros_like, like), key=key, standard_deviation=deviation)
        return self._streaming().multiply_next(fresh, state)

    def epsilon(self, *, noise_multiplier: float, delta: float) -> float | None:
        """Returns the epsilon of all T rounds: hospital-level, add or remove one, exact Gaussian; None: unbounded."""
        release = SampledGaussian("all", 1, 1, noise_multiplier)
        figure = accounting.epsilon(release, rounds=1, delta=delta)
        return figure if math.isfinite(figure) else None

    def prefix_error(self) -> float:
        """Returns the root mean square error of the T prefix sums at zS = 1; independent noise has its own formula.

        Independent noise at the same epsilon has sqrt(k (T + 1) / 2).
        """
        toeplitz = _library()
        errors = toeplitz.per_query_error(strategy_coef=jnp.asarray(self.coefficients), n=self.rounds)
        return self.sensitivity * math.sqrt(float(jnp.mean(errors)))

    def _streaming(self) -> Any:
        return _library().inverse_as_streaming_matrix(jnp.asarray(self.coefficients, jnp.float32))


def banded_noise(*, rounds: int, bands: int, participations: int = 1, separation: int | None = None) -> BandedNoise:
    """Returns the banded strategy with the least mean squared error of the prefix sums.

    Args:
        rounds: T.
        bands: rounds whose noise is correlated, and `bands - 1` trees of state; 1 is independent noise.
        participations: k.
        separation: b; `bands` when absent, at which the sensitivity is sqrt(k).

    Raises:
        PrivacyError: a value is out of range, or the pattern does not fit into T rounds.
        ImportError: jax-privacy is missing.
    """
    separation = bands if separation is None else separation
    for field, value, most in (
        ("rounds", rounds, None),
        ("bands", bands, rounds),
        ("separation", separation, rounds),
        ("participations", participations, -(-rounds // max(separation, 1))),
    ):
        if value < 1 or (most is not None and value > most):
            limit = "must be at least 1" if most is None else f"must lie between 1 and {most}"
            raise PrivacyError(field, value, f"{limit} for {rounds} rounds {separation} apart" if most else limit)
    toeplitz = _library()
    coefficients = toeplitz.optimize_banded_toeplitz(n=rounds, bands=bands)
    squared = toeplitz.minsep_sensitivity_squared(
        coefficients, min_sep=separation, max_participations=participations, n=rounds
    )
    # Float32 rounding must not lower the sensitivity.
    sensitivity = math.sqrt(float(squared)) * (1 + 1e-6)
    return BandedNoise(tuple(float(value) for value in coefficients), rounds, participations, separation, sensitivity)


def _library() -> Any:
    try:
        from jax_privacy.matrix_factorization import toeplitz
    except ImportError as error:
        raise ImportError("correlated noise needs jax-privacy: pip install 'capsfl[matrix]'") from error
    return toeplitz
