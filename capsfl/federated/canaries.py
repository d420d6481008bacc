"""A lower bound on the epsilon of the round that ships: canary hospitals go in by a coin, and we guess the coins.

One run (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846) with canaries that are whole hospitals, as in Andrew et
al. 2024, "One-shot empirical privacy estimation for federated learning" (arXiv:2302.03098).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federation import Federation, RoundsConfig
from capsfl.federated.hospitals import Hospitals
from capsfl.federated.local import LocalConfig
from capsfl.learning.tasks import Task
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.lower_bound import epsilon_ceiling, epsilon_lower_bound
from capsfl.privacy.plan import PrivacyConfig
from capsfl.settings import Settings

NORMS = (1.0, 1.0, 2.0, 50.0)
"""Norms of the canaries in units of S, in turn. None is below S, so that each moves the sum by all it may; the
last is far above, and a clip that lets it through shows at once."""

GUESSED = (1.0, 0.5, 0.1)
"""Shares of the canaries whose coins are guessed, surest first, fixed before any score is seen. Much noise favours
many guesses, a clip that fails for some canaries favours few."""


class AuditConfig(Settings):
    """The empirical audit of a privacy claim."""

    canaries: int = Field(default=1000, ge=1000)
    """n, hospitals that a fair coin puts in or leaves out; the audit can show an epsilon of about ln(n / 3)."""
    dimension: int | None = Field(default=None, ge=1000)
    """Weights of the audited model, at least n so that canaries do not disturb each other; 2 n when absent."""
    rounds: int = Field(default=1, ge=1)
    """Federated rounds all of whose models are released."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Chance that the lower bound is true."""
    seed: int = Field(default=0, ge=0)
    """Seed of the coins, the directions and the rounds."""


def audit_privacy(
    privacy: PrivacyConfig, *, config: AuditConfig | None = None, devices: DevicesConfig | None = None
) -> dict[str, Any]:
    """Runs the engine's own rounds over canaries and returns the epsilon they prove beside the one claimed.

    The relation is adding or removing one hospital: a canary left out by its coin has no records, so it trains
    nothing and adds nothing while the population, its samplers and the divisor m stay what they were. The n
    canaries are the whole population, so `privacy.cohort` counts out of n.

    Returns:
        Flat JSON: `claimed_epsilon`, `delta`, `relation`, `lower_bound` at `confidence`, `ceiling` (what this
        audit would show if every guess were right), `guesses` and `right` of the bound that won, `accuracy` over
        all canaries, the setting (`sampler`, `cohort`, `noise_multiplier`, `clip_norm`, `canaries`, `dimension`,
        `loudest_norm` in units of S, `rounds`, `seed`), and `verdict`: `refuted` when the bound exceeds the claim,
        `blunt` when the ceiling does not, so that no run could refute it, `not refuted` otherwise.

    Raises:
        PrivacyError: Nothing is claimed (no noise), or the settings contradict each other.
    """
    config = config or AuditConfig()
    dimension = 2 * config.canaries if config.dimension is None else config.dimension
    if dimension < config.canaries:
        remedy = f"must be at least audit.canaries ({config.canaries}), or canaries disturb each other"
        raise PrivacyError("audit.dimension", dimension, remedy)
    if privacy.local_epsilon is not None:
        remedy = "its claim is for replacing a hospital, the coins add or remove one; audit Gaussian noise"
        raise PrivacyError("privacy.local_epsilon", privacy.local_epsilon, remedy)
    if privacy.sampler == "fixed":
        remedy = 'its claim is for replacing a hospital, the coins add or remove one; audit "all" or "poisson"'
        raise PrivacyError("privacy.sampler", privacy.sampler, remedy)
    generator = np.random.default_rng(config.seed)
    included = generator.integers(0, 2, config.canaries).astype(bool)
    directions = _draw_directions(generator, config.canaries, dimension)
    norms = privacy.clip_norm * np.resize(NORMS, config.canaries)
    federation = Federation(
        _follow_directions(dimension),
        Hospitals(
            tuple(f"canary-{index}" for index in range(config.canaries)),
            {"direction": (norms[:, None] * directions).astype(np.float32)[:, None, :]},
            included.astype(np.int32),
        ),
        config=RoundsConfig(
            rounds=config.rounds, local=LocalConfig(optimizer="sgd", learning_rate=1.0, batch_size=1, epochs=1)
        ),
        privacy=privacy,
        devices=devices or DevicesConfig(chunk=50),
        seed=config.seed,
        stream="audit",
    )
    plan = federation.plan
    claimed = plan.epsilon(config.rounds)
    if claimed is None:
        remedy = "without noise nothing is claimed, so there is nothing to audit; set it above 0"
        raise PrivacyError("privacy.noise_multiplier", privacy.noise_multiplier, remedy)
    first = state = federation.init()
    for _ in range(config.rounds):
        state, _ = federation.step(state)
    moved = np.asarray(state.parameters["weights"], np.float64) - np.asarray(first.parameters["weights"], np.float64)
    scores = plan.expected_cohort * (directions @ moved)
    # Halfway between the means of a canary left out (0) and one taken in (S in each round it is drawn).
    threshold = config.rounds * plan.mechanism.sampling_probability * privacy.clip_norm / 2
    guesses = [max(1, round(share * config.canaries)) for share in GUESSED]
    return {
        "claimed_epsilon": claimed,
        "delta": privacy.delta,
        "relation": plan.mechanism.relation,
        **_bound_epsilon(
            scores - threshold,
            included,
            guesses=guesses,
            delta=privacy.delta,
            confidence=config.confidence,
            claim=claimed,
        ),
        "confidence": config.confidence,
        "sampler": privacy.sampler,
        "cohort": plan.mechanism.cohort,
        "noise_multiplier": privacy.noise_multiplier,
        "clip_norm": privacy.clip_norm,
        "canaries": config.canaries,
        "dimension": dimension,
        "loudest_norm": max(NORMS),
        "rounds": config.rounds,
        "seed": config.seed,
    }


def _draw_directions(generator: np.random.Generator, canaries: int, dimension: int) -> np.ndarray:
    """Draws orthonormal directions `(canaries, dimension)` in float64, so that no canary speaks in another's name."""
    directions, _ = np.linalg.qr(generator.normal(size=(dimension, canaries)))
    return directions.T


def _follow_directions(dimension: int) -> Task:
    """A task whose gradient is minus the hospital's record: one SGD step of rate 1 moves the weights by it."""

    def loss(parameters: Any, batch: Any) -> jax.Array:
        return -jnp.mean(jnp.sum(batch["direction"] * parameters["weights"][None, :], axis=1))

    def merge(parameters: Any) -> Any:
        raise TypeError("the audit's linear task has no network")

    return Task("audit", loss, lambda *_: {}, {"weights": np.zeros(dimension, np.float32)}, merge)


def _bound_epsilon(
    leanings: np.ndarray, included: np.ndarray, *, guesses: Sequence[int], delta: float, confidence: float, claim: float
) -> dict[str, Any]:
    """Guesses "in" above 0 and "out" below, surest first, and keeps the best bound over the numbers of guesses."""
    right = (leanings > 0) == included
    surest = np.argsort(-np.abs(leanings), kind="stable")
    # Bonferroni: every one of the bounds must be true for the best of them to be.
    each = 1 - (1 - confidence) / len(guesses)
    canaries = len(included)
    best, best_guesses, best_right, ceiling = -1.0, 0, 0, 0.0
    for count in guesses:
        hits = int(right[surest[:count]].sum())
        bound = epsilon_lower_bound(right=hits, guesses=count, canaries=canaries, delta=delta, confidence=each)
        most = epsilon_ceiling(guesses=count, canaries=canaries, delta=delta, confidence=each)
        ceiling = max(ceiling, most)
        if bound > best:
            best, best_guesses, best_right = bound, count, hits
    if best > claim:
        verdict = "refuted"
    else:
        verdict = "blunt" if ceiling <= claim else "not refuted"
    return {
        "lower_bound": best,
        "ceiling": ceiling,
        "verdict": verdict,
        "guesses": best_guesses,
        "right": best_right,
        "accuracy": float(right.mean()),
    }
