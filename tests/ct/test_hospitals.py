"""Drawn hospitals and splits, for any collection: nobody in two places, nobody lost, shares as asked for."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfl.ct.collections import CollectionConfig, ScanEntry
from capsfl.ct.collections.entries import NAME, distinct_names, numbered
from capsfl.ct.collections.hospitals import assign_hospitals, draw_splits, keep_apart, keep_together
from capsfl.ct.errors import ManifestError


def config_of(**fields):
    return CollectionConfig(name="dicom-folder", **fields)


def entries_of(people):
    """Entries of people given as (site, label, split, scans); of several scans the second is of another site.

    Somebody with one scan is known by its name alone, which another site may have given too.
    """
    entries = []
    for number, (site, label, split, scans) in enumerate(people):
        for scan in range(scans):
            name = f"p{number // 2}" + (f"-s{scan}" if scan else "")
            entries.append(
                ScanEntry(
                    name,
                    f"{site}{number % 2 + 2 * (scan == 1)}",
                    Path(str(number)),
                    scanner=f"S{(number + scan) % 3}",
                    label=label,
                    split=split,
                    person=f"person-{number}" if scans > 1 else None,
                )
            )
    return tuple(entries)


people = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.sampled_from([0, 1, 2, None]),
        st.sampled_from(["train", "test", None]),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=24,
)


@settings(max_examples=60, deadline=None)
@given(people, st.sampled_from(["even", "dirichlet", "scanner", "collection"]), st.integers(1, 4), st.integers(0, 3))
def test_nobody_is_in_two_hospitals_or_lost(given_people, rule, count, seed):
    entries = entries_of(given_people)
    config = config_of(hospitals=rule, count=count, seed=seed, alpha=1.0)
    trainable = {entry.image for entry in entries if entry.split != "test"}
    named = keep_apart(keep_together(entries)[0], tuple(entry.hospital for entry in entries), config)
    try:
        placed, _ = keep_together(assign_hospitals(named, config))
    except ManifestError:
        assert len(trainable) < count or rule == "dirichlet" or len(trainable) < 4 * count
        return
    assert [(entry.image, entry.label, entry.split) for entry in placed] == [
        (entry.image, entry.label, entry.split) for entry in entries
    ]
    homes = defaultdict(set)
    for after in placed:
        homes[after.image].add(after.hospital)
        assert NAME.fullmatch(after.patient)
    assert all(len(home) == 1 for home in homes.values())
    if rule in ("even", "dirichlet"):
        assert len({entry.hospital for entry in placed if entry.split != "test"}) == count
    assert len({(entry.hospital, entry.patient) for entry in placed}) == len(entries)
    splits = defaultdict(set)
    for entry in draw_splits(placed, config):
        splits[entry.image].add(entry.split)
    assert all(len(split) == 1 for split in splits.values())


def test_a_small_alpha_is_skewed_and_a_large_one_even():
    entries = tuple(ScanEntry(f"p{n}", "x", Path("x"), label=n % 2) for n in range(400))
    spread = {}
    for alpha in (0.1, 1.0, 1000.0):
        draws = []
        for seed in range(10):
            placed = assign_hospitals(entries, config_of(hospitals="dirichlet", count=4, alpha=alpha, seed=seed))
            counts = Counter((entry.hospital, entry.label) for entry in placed)
            draws += [counts[f"hospital-{h}", label] for h in range(1, 5) for label in (0, 1)]
        spread[alpha] = np.std(draws)
    assert spread[0.1] > 1.3 * spread[1.0] > 5 * spread[1000.0]
    # Shares of a symmetric Dirichlet have the variance (1/k)(1 - 1/k) / (k alpha + 1).
    assert spread[1.0] == pytest.approx(200 * np.sqrt(0.25 * 0.75 / 5), rel=0.25)


def test_names_are_safe_and_distinct():
    names = distinct_names(["Müller & Söhne", "M-ller-S-hne", "a/b", "A B", "", "x" * 200])
    assert all(NAME.fullmatch(name) for name in names.values())
    assert len({name.lower() for name in names.values()}) == 6
    assert numbered(["Zoe", "Anna", "Zoe"], "patient") == {"Anna": "patient-0001", "Zoe": "patient-0002"}
