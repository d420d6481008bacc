"""What every member of a cohort handed over in a round, where somebody has to see it: to commit to it, one by one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class CohortUpdates:
    """The clipped updates of a cohort, un-noised unless each hospital noised its own: for their hospitals alone.

    As much memory as one model for every slot, on the devices and, once asked for, on the host.

    Attributes:
        stack: leaves `(slots, ...)`.
        slots: the slot of each member, by name.
    """

    stack: Any
    slots: Mapping[str, int]

    def on_host(self) -> dict[str, Any]:
        """Returns `{member: pytree of arrays like the weights}`; waits for the round, and for nothing after it."""
        stack = jax.tree.map(np.asarray, self.stack)
        return {name: jax.tree.map(lambda leaf, slot=slot: leaf[slot], stack) for name, slot in self.slots.items()}
