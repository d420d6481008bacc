"""Masked words add up to exactly the sum of the rounded updates, whoever drops out and however they are laid out."""

import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from capsfl.federated.aggregation import AggregationConfig, make_rule, make_secure_sum
from capsfl.federated.local import LocalResult
from capsfl.federated.round import CohortRecords, RoundState, Setting, make_round
from capsfl.federated.secure import SecureSum, draw_roster
from capsfl.federated.server import ServerConfig, make_server_optimizer
from capsfl.privacy.clipping import clip_by_global_norm
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.plan import PrivacyConfig, PrivacyPlan

SLOTS, DIMENSION, CLIP = 8, 33, 0.5
KEY = jax.random.key(11)
SUMS = [
    SecureSum(SLOTS, DIMENSION),
    SecureSum(SLOTS, DIMENSION, neighbours=2),
    SecureSum(SLOTS, DIMENSION, word_bits=20, neighbours=4),
]


@cache
def opened(secure: SecureSum):
    """`(updates, hospitals, invited, arrived) -> (rounded updates, words, opened sum)` of one cohort, compiled."""

    @jax.jit
    def run(updates, hospitals, invited, arrived):
        clipped = jax.vmap(lambda update: clip_by_global_norm(update, secure.clip_share * CLIP)[0])(updates)
        steps = jax.vmap(lambda update: secure.quantise(update, CLIP))(clipped)
        roster = draw_roster(hospitals, invited, arrived, key=KEY)
        words = jax.vmap(lambda own, hospital: secure.mask(own, hospital, roster, key=KEY))(steps, hospitals)
        total = jnp.sum(jnp.where((invited & arrived)[:, None], words, jnp.uint32(0)), axis=0)
        return steps, words, secure.unmask(total, roster, key=KEY)

    return run


def exact_sum(steps, who):
    return [sum(int(value) for value in column) for column in np.asarray(steps)[who].T]


@pytest.mark.parametrize("secure", SUMS, ids=["all", "two", "four, 20 bits"])
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    size=st.sampled_from([0.0, 1e-3, 1.0, 1e6]),
    invited=st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS),
    arrived=st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS),
)
@example(seed=0, size=1.0, invited=[True] * SLOTS, arrived=[True] * SLOTS)
@example(seed=0, size=1.0, invited=[True] * SLOTS, arrived=[False] * SLOTS)
@example(seed=0, size=1.0, invited=[False] * (SLOTS - 1) + [True], arrived=[True] * SLOTS)
def test_the_opened_sum_is_that_of_the_integers_bit_for_bit(secure, seed, size, invited, arrived):
    generator = np.random.default_rng(seed)
    updates = (size * generator.normal(size=(SLOTS, DIMENSION))).astype(np.float32)
    hospitals = generator.permutation(50)[:SLOTS].astype(np.int32)
    steps, _, total = opened(secure)(updates, hospitals, np.array(invited), np.array(arrived))
    assert np.asarray(total).tolist() == exact_sum(steps, np.array(invited) & np.array(arrived))


@pytest.mark.parametrize("secure", SUMS, ids=["all", "two", "four, 20 bits"])
def test_a_sum_of_loudest_updates_in_one_direction_does_not_wrap(secure):
    updates = np.zeros((SLOTS, DIMENSION), np.float32)
    updates[:, 4] = -1e30
    everybody = np.ones(SLOTS, bool)
    _, _, total = opened(secure)(updates, np.arange(SLOTS, dtype=np.int32), everybody, everybody)
    assert secure.levels * SLOTS < 2 ** (secure.word_bits - 1)
    # 1e30 squared is past float32: discarded, as without masks.
    assert not np.asarray(total).any()
    _, _, total = opened(secure)(updates * np.float32(1e-20), np.arange(SLOTS, dtype=np.int32), everybody, everybody)
    found = np.asarray(secure.restore(total, CLIP))
    assert found[4] == pytest.approx(-SLOTS * secure.clip_share * CLIP, rel=1e-5)
    assert not np.delete(found, 4).any()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    bits=st.integers(14, 32),
    clip_norm=st.floats(2.0**-10, 2.0**10, width=32),
    spikes=st.integers(1, DIMENSION),
)
def test_the_rounded_update_has_a_norm_of_at_most_s_in_exact_arithmetic(seed, bits, clip_norm, spikes):
    secure = SecureSum(SLOTS, DIMENSION, bits)
    update = np.zeros(DIMENSION, np.float32)
    update[:spikes] = np.random.default_rng(seed).normal(size=spikes)
    clipped, _ = clip_by_global_norm(1e3 * clip_norm * update, secure.clip_share * clip_norm)
    steps = np.asarray(secure.quantise(clipped, clip_norm))
    assert 0 < sum(int(step) ** 2 for step in steps) <= secure.levels**2


def test_rounding_to_nearest_without_the_narrower_clip_would_exceed_s():
    # Every coordinate lies above the middle between two steps: the case the bound is made for.
    secure = SecureSum(1, 8100, 10)
    update = jnp.full(8100, CLIP / 90)
    steps = np.asarray(secure.quantise(update, CLIP), np.int64)
    assert (steps**2).sum() > secure.levels**2
    clipped, _ = clip_by_global_norm(update, secure.clip_share * CLIP)
    assert (np.asarray(secure.quantise(clipped, CLIP), np.int64) ** 2).sum() <= secure.levels**2


def bytes_chi_square(words: np.ndarray, bits: int) -> float:
    """The larger p-free statistic over the low and the high byte: chi-square with 255 degrees of freedom."""
    counts = [np.bincount(words >> shift & 255, minlength=256) for shift in (0, bits - 8)]
    return max(((count - words.size / 256) ** 2 / (words.size / 256)).sum() for count in counts)


@pytest.mark.parametrize(("bits", "neighbours"), [(32, None), (20, 2)])
def test_the_words_of_one_hospital_are_uniform_whatever_it_hides(bits, neighbours):
    size = 1 << 17
    secure = SecureSum(4, size, bits, neighbours)
    roster = draw_roster(jnp.arange(4), jnp.ones(4, bool), jnp.ones(4, bool), key=KEY)
    steps = jnp.where(jnp.arange(size) % 2 == 0, 3, -1)
    words = np.asarray(jax.jit(partial(secure.mask, key=KEY))(steps, jnp.int32(2), roster))
    threshold = stats.chi2.ppf(1 - 1e-4, 255)
    assert words.dtype == np.uint32
    assert words.max() < 2**bits
    assert bytes_chi_square(words, bits) < threshold
    assert abs(np.corrcoef(words.astype(np.float64), np.asarray(steps))[0, 1]) < 4.5 / np.sqrt(size)
    bare = np.asarray(steps).view(np.uint32) & np.uint32(2**bits - 1)
    assert bytes_chi_square(bare, bits) > threshold


def test_masks_differ_between_rounds_and_hospitals_and_do_not_depend_on_the_slot():
    secure = SUMS[0]
    steps, everybody = jnp.zeros((SLOTS, DIMENSION)), np.ones(SLOTS, bool)
    _, words, _ = opened(secure)(steps, np.arange(SLOTS, dtype=np.int32), everybody, everybody)
    _, moved, _ = opened(secure)(steps, np.arange(SLOTS, dtype=np.int32)[::-1].copy(), everybody, everybody)
    np.testing.assert_array_equal(words, np.asarray(moved)[::-1])
    assert len({row.tobytes() for row in np.asarray(words)}) == SLOTS
    roster = draw_roster(jnp.arange(SLOTS), jnp.asarray(everybody), jnp.asarray(everybody), key=KEY)
    later = secure.mask(jnp.zeros(DIMENSION, jnp.int32), jnp.int32(3), roster, key=jax.random.fold_in(KEY, 1))
    assert not np.array_equal(later, np.asarray(words)[3])


def test_memory_of_masking_does_not_grow_with_the_cohort():
    def temporaries(slots: int) -> int:
        size = 50_000
        secure = SecureSum(slots, size)
        roster = draw_roster(jnp.arange(slots), jnp.ones(slots, bool), jnp.ones(slots, bool), key=KEY)
        run = jax.jit(partial(secure.mask, key=KEY))
        memory = run.lower(jnp.zeros(size, jnp.int32), jnp.int32(0), roster).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporaries(64) <= temporaries(4) + 4096


WEIGHTS = 257
ROWS = np.random.default_rng(5).normal(size=(7, WEIGHTS)).astype(np.float32)


def hand_in(parameters, records, count, *, key, learning_rate, drift=None):
    """A hospital whose update is its record: the same bits in every chunk and on every device."""
    return LocalResult({"w": records["row"][0]}, jnp.float32(0), jnp.int32(1))


@cache
def compiled(aggregation: Any, privacy: Any, hospitals: int, size: int, chunk: int) -> Any:
    """The plan's round over `hospitals` weights of one size, and the optimizer's state before it."""
    plan = PrivacyPlan.build(privacy, num_hospitals=hospitals)
    parameters = {"w": jnp.zeros(size)}
    server = partial(make_server_optimizer, ServerConfig())
    body = make_round(
        hand_in,
        server,
        plan,
        chunk=chunk,
        rule=make_rule(aggregation, plan),
        secure=make_secure_sum(aggregation, plan, parameters),
        dropout=aggregation.dropout,
    )
    state = RoundState(parameters, server(1.0).init(parameters), jnp.int32(0))
    if privacy.clipping == "quantile":
        state = state._replace(clip_norm=jnp.float32(privacy.clip_norm))
    return jax.jit(body), state


def run_round(aggregation=None, privacy=None, *, rows=ROWS, counts=None, chunk=1, number=0):
    """The state and the slots after one round over the rows as hospitals."""
    privacy = privacy or PrivacyConfig(clip_norm=CLIP)
    config: Any = (aggregation or AggregationConfig(secure=True), privacy)
    body, state = compiled(*config, *rows.shape, chunk)
    slots = -(-len(rows) // chunk) * chunk
    counts = np.ones(len(rows), np.int32) if counts is None else np.asarray(counts, np.int32)
    pad = slots - len(rows)
    cohort: Any = (
        {"row": np.pad(rows, ((0, pad), (0, 0)))[:, None]},
        np.pad(counts, (0, pad)),
        np.pad(np.arange(len(rows), dtype=np.int32), (0, pad)),
    )
    setting = Setting(*(jnp.float32(value) for value in (privacy.clip_norm, privacy.noise_multiplier, 1.0, 1.0)))
    state, metrics = body(state, CohortRecords(*cohort), setting, jax.random.fold_in(jax.random.key(3), number))
    return state, jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1)[: len(rows)], metrics.slots)


def weights(*arguments, **options) -> np.ndarray:
    return np.asarray(run_round(*arguments, **options)[0].parameters["w"])


def test_a_secure_round_is_the_plain_one_to_within_its_steps():
    secure = SecureSum(7, WEIGHTS)
    difference = np.linalg.norm(weights() - weights(AggregationConfig()))
    assert 0 < difference <= CLIP * (1 - secure.clip_share) + CLIP * np.sqrt(WEIGHTS) / (2 * secure.levels)


def test_chunks_and_the_graph_of_partners_leave_the_sum_bit_identical():
    alone = weights(AggregationConfig(secure=True, dropout=0.5))
    assert alone.any()
    few = AggregationConfig(secure=True, dropout=0.5, secure_neighbours=2)
    assert weights(few, chunk=3).tobytes() == alone.tobytes()


def test_those_who_drop_out_are_named_and_the_others_add_up():
    config = AggregationConfig(secure=True, dropout=0.5)
    state, slots = run_round(config)
    assert 0 < slots.arrived.sum() < 7
    assert np.isfinite(slots.update_norm).all()
    expected = weights(rows=ROWS, counts=slots.arrived)
    assert np.asarray(state.parameters["w"]).tobytes() == expected.tobytes()
    np.testing.assert_allclose(weights(AggregationConfig(), counts=slots.arrived), expected, atol=1e-5)
    patterns = {run_round(config, number=number)[1].arrived.tobytes() for number in range(3)}
    assert len(patterns) > 1


def test_adding_a_hospital_moves_the_secure_mean_by_at_most_s_over_m_and_nearly_attains_it():
    others = weights(counts=[1, 1, 1, 1, 1, 1, 0]).astype(np.float64)
    moved = np.linalg.norm(weights() - others)
    assert CLIP / 7 * (1 - 1e-4) < moved <= CLIP / 7


def test_the_noise_on_the_secure_mean_is_zs_over_m():
    rows = np.zeros((2, 200_000), np.float32)
    noise = weights(privacy=PrivacyConfig(clip_norm=CLIP, noise_multiplier=2.0), rows=rows)
    assert noise.std() == pytest.approx(2.0 * CLIP / 2, rel=0.01)


def test_a_hospital_with_nan_adds_nothing_to_a_secure_sum():
    broken = ROWS.copy()
    broken[2, 5] = np.nan
    state, slots = run_round(rows=broken)
    assert np.flatnonzero(~np.isfinite(slots.update_norm)).tolist() == [2]
    expected = weights(counts=np.arange(7) != 2)
    assert np.asarray(state.parameters["w"]).tobytes() == expected.tobytes()


def test_the_bits_of_quantile_clipping_travel_with_the_masked_update():
    norms = np.linspace(0.1, 1.0, 7)
    rows = (ROWS * (norms / np.linalg.norm(ROWS, axis=1))[:, None]).astype(np.float32)
    privacy = PrivacyConfig(clip_norm=CLIP, clipping="quantile", bit_noise=1e-3)
    state, _ = run_round(privacy=privacy, rows=rows)
    # Three of seven norms are at most C; the step goes 0.2 of the way from 3/7 to 1/2, in the exponent.
    assert (norms <= CLIP).sum() == 3
    assert state.clip_norm is not None
    assert float(state.clip_norm) == pytest.approx(CLIP * np.exp(-0.2 * (3 / 7 - 1 / 2)), rel=1e-3)
    assert np.linalg.norm(state.parameters["w"]) > 0


def test_pmap_and_shard_map_open_the_same_sum_as_one_device():
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("secure_layouts.py")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["devices"] == 4
    assert answer["moved"] > 0
    assert answer["identical"] == {"pmap": True, "shard_map": True}


@pytest.mark.parametrize(
    ("field", "aggregation", "privacy", "options"),
    [
        ("aggregation.rule = median", {"rule": "median"}, {}, {}),
        ("aggregation.rule = krum", {"rule": "krum"}, {}, {}),
        ("aggregation.rule = weighted", {"rule": "weighted"}, {}, {}),
        ("aggregation.rule = mae_votes", {"rule": "mae_votes"}, {}, {}),
        ("privacy.clipping = median", {}, {"clipping": "median"}, {}),
        ("privacy.mechanism = laplace", {}, {"mechanism": "laplace", "local_epsilon": 1.0, "clip_kind": "l1"}, {}),
        ("scaffold = true", {}, {}, {"scaffold": True}),
        ("diagnostics = true", {}, {}, {"diagnostics": True}),
        ("aggregation.secure_bits = 6", {"secure_bits": 6}, {}, {}),
    ],
)
def test_what_needs_single_updates_or_too_narrow_words_is_refused_by_name(field, aggregation, privacy, options):
    plan = PrivacyPlan.build(PrivacyConfig(clip_norm=CLIP, **privacy), num_hospitals=7)
    config = AggregationConfig(secure=True, **aggregation)
    with pytest.raises(PrivacyError, match=f"^{field}: "):
        make_secure_sum(config, plan, {"w": np.zeros(100)}, **options)


@pytest.mark.parametrize("field", [{"secure_bits": 16}, {"secure_neighbours": 4}])
def test_a_field_of_secure_aggregation_without_it_is_refused_by_name(field):
    plan = PrivacyPlan.build(PrivacyConfig(clip_norm=CLIP), num_hospitals=7)
    (name,) = field
    with pytest.raises(PrivacyError, match=rf"^aggregation\.{name} = .*secure = true"):
        make_rule(AggregationConfig(**field), plan)
