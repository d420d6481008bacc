"""Secure aggregation, simulated: the server adds up masked words and sees the sum, never one hospital's update.

    y_h = q_h + PRG(b_h) + sum_{j > h} PRG(s_hj) - sum_{j < h} PRG(s_jh)    mod 2^b

(Bonawitz et al. 2017; the k-regular graph of partners is Bell et al.'s, 2020.) q_h is the update in integer steps,
b_h a seed of the hospital's own, s_hj a seed that hospitals h and j share. In the sum the shared masks of two
hospitals that both arrive cancel. The server takes out the rest from seeds that the others reveal: b_h of everyone
who arrived, s_hj where one of the two dropped out after both had agreed on it. Integers mod 2^b add up exactly in any
order, so the sum does not depend on chunks, devices or processes.

Arithmetic. With n slots, each update has at most Q = floor((2^(b-1) - 1) / n) steps of size S / Q, so no sum of n
leaves the signed b-bit range and none can wrap. Rounding to the nearest step moves a vector of d steps by at most
sqrt(d) / 2 of them. The update is therefore clipped to

    S (1 - sqrt(d) / (2 Q) - 2^-16)

before it is rounded: what is added has L2 norm at most S after rounding, and the sensitivity S that the privacy
statement rests on holds for the integers themselves. (2^-16 covers float32 rounding of the norm.) Gaussian noise is
added to the opened sum, as without masks.

What is simulated: the words, the graph, drop-outs and the opening are the protocol's. Key agreement, secret sharing
of the seeds, signatures and the network are not here: all seeds are folded from the round's key, which this process
holds, and the generator is JAX's threefry rather than a vetted stream cipher. So this protects nothing inside the
process. It shows what the protocol costs and what its rounding does to training. Deployed, the protocol leaves an
honest-but-curious server, and hospitals that collude with it, nothing but the sum over the honest hospitals, as long
as those that arrive stay connected by seeds they share. It does not hide that sum (only noise does), which for a
single arrival is its update: the protocol's threshold, below which nobody reveals seeds, is not simulated. And it
stops no liar: a hospital can still send any update within the clip norm, and rules that would notice (Krum, medians)
cannot run on masked words.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsfl.privacy.events import PrivacyError

_ROUNDING = 2.0**-16


class Roster(NamedTuple):
    """Who agreed on seeds in a round, around the ring on which partners are neighbours.

    Attributes:
        hospitals: `(slots,)` int32 hospital numbers; those that were invited come first.
        arrived: `(slots,)` bool, whose words the server received.
        invited: scalar int32, how many agreed on seeds.
    """

    hospitals: jax.Array
    arrived: jax.Array
    invited: jax.Array


def draw_roster(hospitals: jax.Array, invited: jax.Array, arrived: jax.Array, *, key: jax.Array) -> Roster:
    """Puts the invited hospitals around a ring in random order, so that nobody chooses their partners.

    Args:
        hospitals: `(slots,)` int32, distinct where invited.
        invited: `(slots,)` bool, who agreed on seeds.
        arrived: `(slots,)` bool, who also handed words over.
        key: the round's key for masks; a hospital's place depends on it and on who is invited, not on slots.
    """
    tickets = jax.vmap(lambda hospital: jax.random.bits(jax.random.fold_in(key, hospital), (), jnp.uint32))(hospitals)
    order = jnp.lexsort((tickets, ~invited))
    return Roster(hospitals[order], (invited & arrived)[order], invited.sum().astype(jnp.int32))


@dataclass(frozen=True)
class SecureSum:
    """The arithmetic of one cohort's masked sum.

    Attributes:
        slots: n, the most hospitals a round takes.
        dimension: d, numbers in an update.
        word_bits: b, the bits of a word on the wire; 32 at most.
        neighbours: k, partners each hospital shares seeds with, even; None for all the others. A round costs k words
            of generator a hospital and number, so all of m make m^2.

    Raises:
        PrivacyError: words so narrow that rounding would take more than half of the clip norm.
    """

    slots: int
    dimension: int
    word_bits: int = 32
    neighbours: int | None = None

    def __post_init__(self) -> None:
        if self.levels < 1 or self.clip_share < 0.5:
            taken = "all" if self.levels < 1 else f"{min(1 - self.clip_share, 1):.0%}"
            raise PrivacyError(
                "secure_bits",
                self.word_bits,
                f"{self.slots} hospitals of {self.dimension:,} weights leave {self.levels} steps to each update, whose "
                f"rounding takes {taken} of the clip norm; use more bits (at most 32), or a smaller cohort",
            )

    @property
    def levels(self) -> int:
        """Q, the steps that make S: the largest number of which `slots` times as many cannot wrap."""
        return (2 ** (self.word_bits - 1) - 1) // self.slots

    @property
    def clip_share(self) -> float:
        """The part of S that updates are clipped to, so that rounding stays within S."""
        return 1 - math.sqrt(self.dimension) / (2 * max(self.levels, 1)) - _ROUNDING

    def quantise(self, update: jax.Array, clip_norm: ArrayLike) -> jax.Array:
        """Rounds an update `(d,)`, clipped to `clip_share * clip_norm`, to int32 steps of L2 norm at most Q."""
        steps = jnp.round(update * (self.levels / jnp.asarray(clip_norm, jnp.float32)))
        # The clip changes nothing that was clipped before; it keeps a caller's mistake from wrapping others' sum.
        return jnp.clip(steps.astype(jnp.int32), -self.levels, self.levels)

    def restore(self, steps: jax.Array, clip_norm: ArrayLike) -> jax.Array:
        """The float32 value of a sum of steps."""
        return steps.astype(jnp.float32) * (jnp.asarray(clip_norm, jnp.float32) / self.levels)

    def mask(self, steps: jax.Array, hospital: jax.Array, roster: Roster, *, key: jax.Array) -> jax.Array:
        """Returns the uint32 words `(d,)` that a hospital hands over, of which only the low `word_bits` count.

        Memory is a few words a number, whatever the cohort: masks are drawn one partner at a time.

        Args:
            steps: `(d,)` int32.
            hospital: scalar int32, one of the invited.
            roster: of the round.
            key: the round's key for masks.
        """
        place = jnp.argmax(roster.hospitals == hospital)
        everybody = jnp.ones_like(roster.arrived)
        masks = self._masks(place, everybody, roster, steps.shape[0], key=key, first=0, last=self._degree(roster))
        return (jax.lax.bitcast_convert_type(steps, jnp.uint32) + masks) & jnp.uint32(2**self.word_bits - 1)

    def unmask(self, total: jax.Array, roster: Roster, *, key: jax.Array) -> jax.Array:
        """Takes the masks that are left out of the sum of the words that arrived: the exact int32 sum `(d,)`.

        Args:
            total: `(d,)` uint32, the words of all that arrived, added up mod 2^32.
            roster: of the round.
            key: the round's key for masks.
        """

        def take_out(place: jax.Array, total: jax.Array) -> jax.Array:
            # Of one that arrived, its own mask. Of one that did not, what it would have added against those that
            # did, which is what cancels their masks.
            here = roster.arrived[place]
            partners = here | roster.arrived
            first, last = jnp.where(here, 0, 1), jnp.where(here, 0, self._degree(roster))
            masks = self._masks(place, partners, roster, total.shape[0], key=key, first=first, last=last)
            return total + jnp.where(here, -masks, masks)

        total = jax.lax.fori_loop(0, roster.invited, take_out, total)
        # Shifting up and back down repeats the word's sign bit.
        unused = 32 - self.word_bits
        return jax.lax.bitcast_convert_type(total << unused, jnp.int32) >> unused

    def _degree(self, roster: Roster) -> jax.Array:
        """How many partners a hospital has."""
        others = roster.invited - 1
        return others if self.neighbours is None else jnp.minimum(others, self.neighbours)

    def _masks(
        self,
        place: jax.Array,
        partners: jax.Array,
        roster: Roster,
        size: int,
        *,
        key: jax.Array,
        first: ArrayLike,
        last: ArrayLike,
    ) -> jax.Array:
        """The sum of a place's masks with its partners `first` to `last` where allowed; number 0 is its own mask."""
        degree = self._degree(roster)
        half = degree // 2

        def add(number: jax.Array, words: jax.Array) -> jax.Array:
            # The nearest half on one side, the rest on the other: symmetric, and all the others where k reaches them.
            offset = jnp.where(number <= half, number, roster.invited + half - number)
            partner = (place + offset) % jnp.maximum(roster.invited, 1)
            own, other = roster.hospitals[place], roster.hospitals[partner]
            seed = jax.random.fold_in(jax.random.fold_in(key, jnp.minimum(own, other)), jnp.maximum(own, other))
            stream = jax.random.bits(seed, (size,), jnp.uint32)
            return words + jnp.where(partners[partner], jnp.where(own <= other, stream, -stream), jnp.uint32(0))

        return jax.lax.fori_loop(first, last + 1, add, jnp.zeros(size, jnp.uint32))
