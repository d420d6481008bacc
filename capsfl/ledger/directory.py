"""Finding who holds what: hospital ids on a ring of XOR distances, one table per category (paper II.C, Eq 12-13).

    Eq 13   d(H_i, H_j) = id_i XOR id_j                  bucket floor(log2 d), at most k contacts each
    Eq 12   d(H_i, H_j) = w(A_i △ A_j) / w(A_i ∪ A_j) · log(1 + physical distance)

After Maymounkov & Mazieres 2002 (Kademlia): every hop asks the contact that is closest to the target, which
shares a strictly longer prefix with it, so a lookup among n hospitals takes at most about log2 n hops. The
printed Eq 12 has log(distance), which is negative below 1 and undefined at 0.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from capsfl.ledger.fields import check_digest, require

CONTACTS = 8


def xor_distance(first: str, second: str) -> int:
    """Returns Eq 13 of two hospital ids in hex."""
    return int(first, 16) ^ int(second, 16)


def attribute_distance(
    first: Collection[str],
    second: Collection[str],
    *,
    physical: float,
    weights: Mapping[str, float] | None = None,
) -> float:
    """Returns Eq 12: how unlike two hospitals' holdings are, scaled by how far apart they stand.

    Args:
        first: attributes of one hospital, such as scanners, protocols and diagnoses.
        second: attributes of the other.
        physical: distance between them in km.
        weights: weight of an attribute, 1 where it is not named.

    Returns:
        0 for equal holdings, for no holdings at all, and at distance 0.

    Raises:
        RecordError: a distance or weight that is negative or not finite.
    """
    weights = weights or {}
    require(math.isfinite(physical) and physical >= 0, "physical", physical, "use a distance in km, 0 or more")
    for name, weight in weights.items():
        require(math.isfinite(weight) and weight >= 0, f"weights.{name}", weight, "use a finite weight, 0 or more")
    union = sum(weights.get(name, 1.0) for name in sorted({*first, *second}))
    if union == 0:
        return 0.0
    apart = sum(weights.get(name, 1.0) for name in sorted(set(first) ^ set(second)))
    return apart / union * math.log1p(physical)


@dataclass
class RoutingTable:
    """What one hospital knows of the others of a category.

    Attributes:
        owner: Its id.
        contacts: k, the most contacts of a bucket; earlier ones stay, since those seen longest last longest.
        buckets: Bucket number to ids.
    """

    owner: str
    contacts: int = CONTACTS
    buckets: dict[int, list[str]] = field(default_factory=dict)

    def add(self, other: str) -> None:
        """Takes an id in, unless it is the owner's, known, or its bucket is full."""
        check_digest("hospital id", other)
        if other == self.owner:
            return
        bucket = self.buckets.setdefault(xor_distance(self.owner, other).bit_length() - 1, [])
        if other not in bucket and len(bucket) < self.contacts:
            bucket.append(other)

    def closest(self, target: str) -> str | None:
        """Returns the known id closest to the target and closer than the owner, or None."""
        known = [other for bucket in self.buckets.values() for other in bucket]
        best = min(known, key=lambda other: xor_distance(other, target), default=self.owner)
        return best if xor_distance(best, target) < xor_distance(self.owner, target) else None


@dataclass(frozen=True)
class Lookup:
    """The way a lookup took.

    Attributes:
        path: Ids asked, from the one that looks to the closest found.
        found: Whether the last one is the target.
    """

    path: tuple[str, ...]
    found: bool

    @property
    def hops(self) -> int:
        """How many other hospitals were asked."""
        return len(self.path) - 1


class Directory:
    """All hospitals' tables, one per category: a simulation of what each would keep for itself.

    Args:
        members: `{category: hospital ids}`.
        contacts: k of every table.
    """

    def __init__(self, members: Mapping[str, Iterable[str]], *, contacts: int = CONTACTS) -> None:
        require(type(contacts) is int and contacts >= 1, "contacts", contacts, "use 1 or more")
        self._tables: dict[str, dict[str, RoutingTable]] = {}
        for category, ids in members.items():
            tables = {owner: RoutingTable(owner, contacts) for owner in sorted(ids)}
            for table in tables.values():
                for other in tables:
                    table.add(other)
            self._tables[category] = tables

    def categories(self) -> tuple[str, ...]:
        """Returns the categories, sorted."""
        return tuple(sorted(self._tables))

    def table(self, category: str, owner: str) -> RoutingTable:
        """Returns one hospital's table of a category.

        Raises:
            RecordError: no such category, or the hospital is not in it.
        """
        tables = self._tables.get(category)
        require(tables is not None, "category", category, f"use one of {', '.join(self.categories()) or 'none'}")
        assert tables is not None
        require(owner in tables, "hospital id", owner, f"not registered under {category}")
        return tables[owner]

    def lookup(self, category: str, start: str, target: str) -> Lookup:
        """Walks from one hospital towards an id, each hop strictly closer to it."""
        check_digest("target", target)
        path = [self.table(category, start).owner]
        while path[-1] != target:
            following = self.table(category, path[-1]).closest(target)
            if following is None:
                break
            path.append(following)
        return Lookup(tuple(path), path[-1] == target)
