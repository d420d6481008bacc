"""One federated round: local training, clip, sum, noise, server step, in one compiled program.

    w_{t+1} = ServerOpt(w_t, (1/m) [sum_h clip_S(w_h - w_t) + N(0, z² S² I)])

(Kumar et al. 2020, Eq 8, after Geyer, Klein & Nabi 2017.) The cohort's slots are cut into chunks of L hospitals;
a chunk is vmapped and chunks are scanned, so activations grow with L and not with the cohort. The same body runs
on one device and, with an axis name, on each of several.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from capsfl.federated import diagnostics
from capsfl.federated.aggregation import Rule
from capsfl.federated.batch_norm import BatchNormRule, hand_over, mean_change, starting_weights, store_own
from capsfl.federated.local import LocalResult
from capsfl.federated.secure import SecureSum, draw_roster
from capsfl.federated.state import CohortRecords as CohortRecords
from capsfl.federated.state import Controls as Controls
from capsfl.federated.state import RoundMetrics as RoundMetrics
from capsfl.federated.state import RoundState as RoundState
from capsfl.federated.state import Setting as Setting
from capsfl.federated.state import SlotMetrics as SlotMetrics
from capsfl.federated.votes import VotingRule, cast_votes, combine_by_votes
from capsfl.learning.tasks import BatchNormWeights, trainable, with_trainable
from capsfl.privacy.adaptive import centred_bit, median_norm, quantile_update, update_multiplier
from capsfl.privacy.clipping import clip_by_global_norm
from capsfl.privacy.laplace import release_laplace
from capsfl.privacy.mechanisms import mean_with_banded_noise, mean_with_noise
from capsfl.privacy.plan import PrivacyPlan


class _Outcome(NamedTuple):
    """What one hospital hands back; under vmap every leaf leads with the chunk axis."""

    contribution: Any
    metrics: SlotMetrics
    raw: Any
    control: Any
    bit: jax.Array | None
    statistics: Any


def make_round(
    local_update: Callable[..., LocalResult],
    server_optimizer: Callable[[jax.Array], optax.GradientTransformation],
    plan: PrivacyPlan,
    *,
    chunk: int,
    axis_name: str | None = None,
    rule: Rule | None = None,
    spread: bool = False,
    secure: SecureSum | None = None,
    voting: VotingRule | None = None,
    dropout: float = 0.0,
    keep_updates: bool = False,
    batch_norm: BatchNormRule | None = None,
    schedule: Callable[[jax.Array], jax.Array] | None = None,
) -> Callable[..., tuple[RoundState, RoundMetrics]]:
    """Builds the body of a round.

    Args:
        local_update: `(parameters, records, count, key=..., learning_rate=..., drift=...) -> LocalResult` of one
            hospital.
        server_optimizer: `learning_rate -> optimizer`, applied to minus the mean update.
        plan: gives m, the fixed divisor of the sum.
        chunk: L, hospitals trained at once; divides the slots a device holds.
        axis_name: device axis over which the clipped updates are summed; None on one device.
        rule: robust rule over the stacked clipped updates, whose memory then grows with the cohort; None for the sum.
        spread: whether to measure how far updates spread, at the price of two more copies of the model.
        secure: adds up masked words instead of updates; only without `rule` and `voting`.
        voting: weighs the stacked clipped updates by the cohort's votes on them, instead of `rule`.
        dropout: the chance that a hospital trains and then is not heard of.
        keep_updates: hands the clipped updates over one by one, whose memory then grows with the cohort.
        batch_norm: what becomes of running statistics; None for a model without.
        schedule: share of the local learning rate after so many rounds; None for all of it in every round.

    Returns:
        `(state, cohort, setting, key) -> (state, metrics)`. `key` is the round's key, the same on every device:
        hospital keys are folded from it, and every device adds the same noise to the same sum.
    """

    privacy = plan.config
    quantile, median = privacy.clipping == "quantile", privacy.clipping == "median"
    # A median of norms is known only when everybody has trained.
    stacked = rule is not None or voting is not None or median
    shared = batch_norm is not None and batch_norm.shared
    assert not ((stacked or keep_updates) and secure), "a rule over single updates cannot see masked ones"

    def contribute(update: Any, bound: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
        """What a hospital adds to the sum, and its L2 norm before clipping."""
        most = jnp.finfo(jnp.float32).max if median else bound
        clipped, norm = clip_by_global_norm(update, most if secure is None else secure.clip_share * most)
        if privacy.local_epsilon is not None:
            clipped, _ = release_laplace(update, key=key, clip_norm=bound, local_epsilon=privacy.local_epsilon)
        return clipped, norm

    def round_body(
        state: RoundState, cohort: CohortRecords, setting: Setting, key: jax.Array
    ) -> tuple[RoundState, RoundMetrics]:
        local_key, noise_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        bound = setting.clip_norm if state.clip_norm is None else state.clip_norm
        rate = setting.local_rate if schedule is None else setting.local_rate * schedule(state.round)
        arrivals = cohort.counts > 0
        if dropout > 0:
            arrivals &= _stay(cohort.hospitals, dropout, key=jax.random.fold_in(key, 5))
        mask_key = jax.random.fold_in(key, 4)
        roster = None
        if secure is not None:
            everybody = _gather((cohort.hospitals, cohort.counts > 0, arrivals), axis_name)
            roster = draw_roster(*everybody, key=mask_key)

        def train_one(records: Any, count: jax.Array, hospital: jax.Array, arrived: jax.Array) -> _Outcome:
            own = drift = None
            if state.controls is not None:
                own = jax.tree.map(lambda leaf: leaf[hospital], state.controls.hospitals)
                drift = jax.tree.map(jnp.subtract, state.controls.server, own)
            with jax.named_scope("local_training"):
                result = local_update(
                    starting_weights(state.parameters, state.statistics, hospital),
                    records,
                    count,
                    key=jax.random.fold_in(local_key, hospital),
                    learning_rate=rate,
                    drift=drift,
                )
            release_key = jax.random.fold_in(jax.random.fold_in(key, 3), hospital)
            contribution, norm = contribute(result.update, bound, release_key)
            if shared:
                contribution, norm = hand_over(contribution, norm, result.statistics, state.parameters.statistics)
            bit = jnp.where(arrived, centred_bit(norm, bound), 0) if quantile else None
            if secure is not None and roster is not None:
                steps = secure.quantise(ravel_pytree(contribution)[0], bound)
                if bit is not None:
                    # The bit travels with the update, in whole halves.
                    steps = jnp.append(steps, (2 * bit).astype(jnp.int32))
                contribution, bit = secure.mask(steps, hospital, roster, key=mask_key), None
            # Nobody in an empty slot, and nothing from a hospital that dropped out.
            contribution = jax.tree.map(lambda leaf: jnp.where(arrived, leaf, jnp.zeros_like(leaf)), contribution)
            control = None
            if drift is not None:
                # Option II of SCAFFOLD: c_h - c + (w_t - w_h) / (K eta); a discarded update leaves c_h alone.
                usable = arrived & jnp.isfinite(norm)
                pace = 1 / (jnp.maximum(result.steps, 1) * rate)
                control = jax.tree.map(
                    lambda c_h, d, u: jnp.where(usable, -d - pace * u, c_h), own, drift, result.update
                )
            statistics = None
            if state.statistics is not None:
                before = jax.tree.map(lambda leaf: leaf[hospital], state.statistics)
                kept = arrived & jnp.isfinite(norm)
                statistics = jax.tree.map(lambda new, old: jnp.where(kept, new, old), result.statistics, before)
            metrics = SlotMetrics(result.loss, norm, arrived)
            raw = result.update if spread else None
            return _Outcome(contribution, metrics, raw, control, bit, statistics)

        def add_chunk(carry: tuple[Any, Any], part: tuple[Any, ...]) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
            total, moments = carry
            if chunk == 1:
                # A batch of one would only cost compile time, and turn convolutions into grouped ones.
                alone = train_one(*jax.tree.map(lambda leaf: leaf[0], part))
                outcome = jax.tree.map(lambda leaf: leaf[None], alone)
            else:
                outcome = jax.vmap(train_one)(*part)
            if spread:
                usable = outcome.metrics.arrived & jnp.isfinite(outcome.metrics.update_norm)
                moments = diagnostics.merge_spread(moments, diagnostics.measure_spread(outcome.raw, usable))
            if not stacked:
                total = jax.tree.map(lambda t, c: t + c.sum(0), total, outcome.contribution)
            stack = outcome.contribution if stacked or keep_updates else None
            return (total, moments), (outcome.metrics, stack, outcome.control, outcome.bit, outcome.statistics)

        chunks = jax.tree.map(lambda leaf: leaf.reshape(-1, chunk, *leaf.shape[1:]), (*cohort, arrivals))
        weights = trainable(state.parameters)
        handed_over = state.parameters if shared else weights
        zero = None if stacked else jax.tree.map(jnp.zeros_like, handed_over)
        if secure is not None:
            zero = jnp.zeros(secure.dimension + quantile, jnp.uint32)
        start = (zero, diagnostics.start_spread(weights) if spread else None)
        (total, moments), outcomes = jax.lax.scan(add_chunk, start, chunks)
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outcomes)
        metrics, stack, controls, bits, statistics = flat
        if axis_name is not None and spread:
            everywhere = jax.lax.all_gather(moments, axis_name)
            devices = everywhere.count.shape[0]
            parts = [jax.tree.map(lambda leaf, device=d: leaf[device], everywhere) for d in range(devices)]
            moments = functools.reduce(diagnostics.merge_spread, parts)
        votes, kept = None, stack if keep_updates else None
        if stacked:
            stack, counts, norms, arrived = _gather(
                (stack, cohort.counts, metrics.update_norm, metrics.arrived), axis_name
            )
            # Whether a hospital's raw update was finite is not part of its Laplace release, which always is.
            usable = arrived if privacy.local_epsilon is not None else arrived & jnp.isfinite(norms)
            if median:
                bound = median_norm(norms, usable, otherwise=setting.clip_norm)
                clipped, _ = jax.vmap(clip_by_global_norm, in_axes=(0, None))(trainable(stack), bound)
                stack = with_trainable(stack, clipped)
            mean = rule(stack, counts, usable) if rule is not None else None
            if voting is not None:
                voters = jnp.where(arrivals, cohort.counts, 0)
                own = _slots(cohort, axis_name)
                errors = cast_votes(voting, state.parameters, stack, cohort.records, voters, own, usable)
                mean, votes = combine_by_votes(stack, _gather(errors, axis_name), usable, voting)
            total = jax.tree.map(lambda leaf: leaf.sum(0), stack)
        else:
            mean = None
            total = total if axis_name is None else jax.lax.psum(total, axis_name)
        bit_sum = jnp.sum(bits) if quantile and secure is None else None
        if secure is not None and roster is not None:
            steps = secure.unmask(total, roster, key=mask_key)
            if quantile:
                bit_sum, steps = steps[-1] / 2, steps[:-1]
            total = ravel_pytree(weights)[1](secure.restore(steps, bound))
        elif bit_sum is not None and axis_name is not None:
            bit_sum = jax.lax.psum(bit_sum, axis_name)
        change = None
        if shared:
            change = mean_change(total.statistics, _count(metrics, axis_name)) if mean is None else mean.statistics
            total, mean = total.trainable, trainable(mean)
        noise = state.noise
        if mean is None and plan.correlated is not None:
            mean, noise = mean_with_banded_noise(
                total, noise, plan=plan, key=noise_key, clip_norm=bound, noise_multiplier=setting.noise_multiplier
            )
        if mean is None:
            multiplier = setting.noise_multiplier
            multiplier = update_multiplier(multiplier, plan.bit_noise) if quantile else multiplier
            mean = mean_with_noise(total, plan=plan, key=noise_key, clip_norm=bound, noise_multiplier=multiplier)
        next_norm = None
        if bit_sum is not None:
            next_norm = quantile_update(
                bound,
                bit_sum,
                expected_cohort=plan.expected_cohort,
                key=jax.random.fold_in(key, 2),
                bit_noise=plan.bit_noise,
                target_quantile=privacy.target_quantile,
                learning_rate=privacy.clip_learning_rate,
            )
        if state.controls is not None:
            controls = _update_controls(state.controls, *_gather((controls, cohort), axis_name))
        pseudo_gradient = jax.tree.map(jnp.negative, mean)
        optimizer = server_optimizer(setting.server_rate)
        updates, server = optimizer.update(pseudo_gradient, state.server, weights)
        parameters = with_trainable(state.parameters, optax.apply_updates(weights, updates))
        if change is not None:
            parameters = BatchNormWeights(
                parameters.trainable, jax.tree.map(jnp.add, state.parameters.statistics, change)
            )
        if state.statistics is not None:
            statistics, places, counts = _gather((statistics, cohort.hospitals, cohort.counts), axis_name)
            statistics = store_own(state.statistics, statistics, places, counts)
        after = RoundState(parameters, server, state.round + 1, controls, next_norm, noise, statistics)
        return after, RoundMetrics(metrics, moments, bound, votes, kept)

    return round_body


def _gather(tree: Any, axis_name: str | None) -> Any:
    """The slots of all devices."""
    if axis_name is None:
        return tree
    return jax.lax.all_gather(tree, axis_name, tiled=True)


def _count(metrics: SlotMetrics, axis_name: str | None) -> jax.Array:
    """How many hospitals of all devices handed over something of use."""
    number = jnp.sum(metrics.arrived & jnp.isfinite(metrics.update_norm))
    return number if axis_name is None else jax.lax.psum(number, axis_name)


def _slots(cohort: CohortRecords, axis_name: str | None) -> jax.Array:
    """The numbers of this device's slots among those of all devices."""
    own = jnp.arange(cohort.counts.shape[0])
    return own if axis_name is None else own + jax.lax.axis_index(axis_name) * own.shape[0]


def _stay(hospitals: jax.Array, dropout: float, *, key: jax.Array) -> jax.Array:
    """Which hospitals are heard of, each by a draw of its own."""
    return jax.vmap(lambda hospital: jax.random.uniform(jax.random.fold_in(key, hospital)) >= dropout)(hospitals)


def _update_controls(old: Controls, found: Any, cohort: CohortRecords) -> Controls:
    """Writes the cohort's c_h and moves c by the mean of their changes over all hospitals."""
    number = jax.tree.leaves(old.hospitals)[0].shape[0]
    places = jnp.where(cohort.counts > 0, cohort.hospitals, number)  # past the end: an empty slot writes nothing
    hospitals = jax.tree.map(lambda o, f: o.at[places].set(f, mode="drop"), old.hospitals, found)
    server = jax.tree.map(lambda c, new, o: c + jnp.mean(new - o, axis=0), old.server, hospitals, old.hospitals)
    return Controls(server, hospitals)
