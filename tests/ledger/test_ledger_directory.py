"""Lookups among many hospitals take few hops, and Eq 12 is a distance one can compute everywhere."""

import math
import random
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsfl.ledger import Directory, LedgerError, attribute_distance, xor_distance
from capsfl.ledger.directory import RoutingTable

IDS = st.integers(0, 2**256 - 1).map(lambda number: f"{number:064x}")


def _ids(count: int, seed: int = 0) -> list[str]:
    return [sha256(f"{seed}/{index}".encode()).hexdigest() for index in range(count)]


@given(IDS, IDS, IDS)
def test_the_xor_distance_is_a_metric(a, b, c):
    assert (xor_distance(a, b) == 0) == (a == b)
    assert xor_distance(a, b) == xor_distance(b, a)
    assert xor_distance(a, c) <= xor_distance(a, b) + xor_distance(b, c)


@pytest.mark.parametrize("count", [1, 2, 8, 64, 300])
def test_every_hospital_is_found_and_every_hop_shares_a_longer_prefix(count):
    ids = _ids(count)
    directory = Directory({"lung CT": ids})
    pairs = [(a, b) for a in ids for b in ids]
    hops = []
    for start, target in random.Random(0).sample(pairs, min(len(pairs), 3000)):
        lookup = directory.lookup("lung CT", start, target)
        assert lookup.found
        assert (lookup.path[0], lookup.path[-1]) == (start, target)
        shared = [256 - xor_distance(member, target).bit_length() for member in lookup.path]
        assert shared == sorted(set(shared))
        hops.append(lookup.hops)
    assert sum(hops) / len(hops) <= max(math.ceil(math.log2(count)), 1)


def test_eight_contacts_a_bucket_take_fewer_hops_than_one():
    ids = _ids(256)
    wide, narrow = (Directory({"c": ids}, contacts=k) for k in (8, 1))
    pairs = random.Random(1).sample([(a, b) for a in ids for b in ids], 800)
    mean = [sum(d.lookup("c", a, b).hops for a, b in pairs) / len(pairs) for d in (wide, narrow)]
    assert mean[0] < mean[1] <= 8  # at most one hop a bit


def test_a_table_holds_at_most_k_contacts_a_bucket_and_keeps_the_oldest():
    owner, *others = _ids(500)
    table = RoutingTable(owner, contacts=8)
    for other in (*others, owner, *others):
        table.add(other)
    sizes = [len(bucket) for bucket in table.buckets.values()]
    assert max(sizes) == 8
    assert sum(sizes) < 100  # log2 n buckets, not n contacts
    farthest = [other for other in others if xor_distance(owner, other).bit_length() == 256]
    assert table.buckets[255] == farthest[:8]


def test_an_id_that_nobody_has_ends_at_the_closest_there_is():
    ids = _ids(64)
    target = sha256(b"nobody").hexdigest()
    directory = Directory({"lung CT": ids, "MR": ids[:2]})
    lookup = directory.lookup("lung CT", ids[0], target)
    assert not lookup.found
    prefix = 256 - min(xor_distance(member, target) for member in ids).bit_length()
    assert 256 - xor_distance(lookup.path[-1], target).bit_length() >= prefix - 1
    assert directory.categories() == ("MR", "lung CT")


def test_categories_and_hospitals_that_are_not_there_are_named():
    directory = Directory({"lung CT": _ids(4)})
    with pytest.raises(LedgerError, match=r"category: 'MR': use one of lung CT"):
        directory.lookup("MR", _ids(1)[0], _ids(1)[0])
    with pytest.raises(LedgerError, match="not registered under lung CT"):
        directory.table("lung CT", "00" * 32)
    with pytest.raises(LedgerError, match="target"):
        directory.lookup("lung CT", _ids(1)[0], "ash")
    with pytest.raises(LedgerError, match="contacts: 0"):
        Directory({}, contacts=0)


@given(st.sets(st.sampled_from("abcdef")), st.sets(st.sampled_from("abcdef")), st.floats(0, 1e4))
def test_equation_12_is_zero_for_equal_holdings_symmetric_and_never_negative(first, second, physical):
    distance = attribute_distance(first, second, physical=physical)
    assert distance == attribute_distance(second, first, physical=physical) >= 0
    assert attribute_distance(first, first, physical=physical) == 0
    if first != second:
        expected = len(first ^ second) / len(first | second) * math.log(1 + physical)
        assert distance == pytest.approx(expected)


def test_equation_12_weighs_attributes_and_refuses_what_is_no_distance():
    weighted = attribute_distance({"GE", "1.25mm"}, {"GE", "5mm"}, physical=math.e - 1, weights={"GE": 2.0})
    assert weighted == pytest.approx(2 / 4)
    for physical, weight in ((-1.0, 1.0), (math.nan, 1.0), (1.0, -1.0)):
        with pytest.raises(LedgerError, match=r"physical|weights\.a"):
            attribute_distance({"a"}, {"b"}, physical=physical, weights={"a": weight})
