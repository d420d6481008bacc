"""Eq 9-11 against NumPy, however the hospitals are cut into chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsfl.federated.diagnostics import Spread, measure_spread, merge_spread, report_spread, start_spread

HOSPITALS = 11
measure, merge, report_of = jax.jit(measure_spread), jax.jit(merge_spread), jax.jit(report_spread)
PARAMETERS = {"conv": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}, "head": jnp.zeros(())}


def draw(seed: int, *, offset: float = 0.0) -> dict:
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (offset + generator.normal(size=(HOSPITALS, *leaf.shape))).astype(np.float32), PARAMETERS
    )


def by_chunks(updates: dict, mask: np.ndarray, sizes: list[int]) -> Spread:
    """The moments, one chunk merged after the other, as a round does it."""
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    measured = [
        measure(jax.tree.map(lambda leaf, rows=rows: jnp.asarray(leaf[rows]), updates), jnp.asarray(mask[rows]))
        for rows in parts
    ]
    return functools.reduce(merge, measured, start_spread(PARAMETERS))


def assert_equations(spread: Spread, updates: dict, mask: np.ndarray, *, rtol: float = 1e-5) -> None:
    report = report_of(spread)
    assert report.keys() == {"conv/bias", "conv/kernel", "head"}
    rows = {"conv/kernel": updates["conv"]["kernel"], "conv/bias": updates["conv"]["bias"], "head": updates["head"]}
    for layer, values in rows.items():
        kept = values[mask].astype(np.float64)
        mean = sum(kept) / len(kept)
        variance = sum((row - mean) ** 2 for row in kept) / len(kept)
        figures = report[layer]
        np.testing.assert_allclose(figures["VAR"], variance, rtol=rtol, err_msg=layer)
        np.testing.assert_allclose(figures["V_c"], np.sum(variance), rtol=rtol, err_msg=layer)
        np.testing.assert_allclose(figures["V_c_mean"], np.sum(variance) / np.size(variance), rtol=rtol)
        np.testing.assert_allclose(figures["U_s"], np.sum(mean**2) / np.size(mean), rtol=rtol, err_msg=layer)


@pytest.mark.parametrize("sizes", [[11], [1] * 11, [4, 4, 3]])
def test_the_report_is_equations_9_to_11_whatever_the_chunks(sizes):
    updates, everybody = draw(0), np.ones(HOSPITALS, bool)
    spread = by_chunks(updates, everybody, sizes)
    assert float(spread.count) == HOSPITALS
    assert_equations(spread, updates, everybody)


def test_empty_slots_and_discarded_updates_do_not_count():
    updates, mask = draw(1), np.array([True, False] * 5 + [True])
    # The last chunk is all empty: what is masked may hold anything.
    mask[8:] = False
    poisoned = jax.tree.map(lambda leaf: np.where(mask.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, np.nan), updates)
    assert_equations(by_chunks(poisoned, mask, [4, 4, 3]), updates, mask)


def test_a_large_part_that_all_share_does_not_drown_the_spread():
    updates = draw(2, offset=1000.0)
    everybody = np.ones(HOSPITALS, bool)
    assert_equations(by_chunks(updates, everybody, [4, 4, 3]), updates, everybody, rtol=2e-3)
    # The textbook difference of mean squares, in the same precision, is off by more than the variance.
    row = updates["head"]
    naive = np.mean(row**2, dtype=np.float32) - np.mean(row, dtype=np.float32) ** 2
    assert abs(naive / row.astype(np.float64).var() - 1) > 0.02


def test_nobody_spreads_nothing():
    updates, nobody = draw(3), np.zeros(HOSPITALS, bool)
    for figures in report_of(by_chunks(updates, nobody, [4, 4, 3])).values():
        for value in figures.values():
            assert not np.any(value)


def test_merging_does_not_depend_on_the_order():
    updates, everybody = draw(4), np.ones(HOSPITALS, bool)
    one, other = (by_chunks(updates, everybody, sizes) for sizes in ([4, 4, 3], [3, 4, 4]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)
