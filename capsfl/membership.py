"""Hospitals that join and leave between two starts of a run: their places, and what the ledger says of them.

The privacy plan of such a run is made for a fixed number of places, taken or not. A place nobody takes is drawn like
any other and adds nothing to the sum, so the mechanism that is accounted is the one that runs whoever has come: the
sampling probability is m / places in every round, and no hospital loses more than if it had been there all along.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capsfl.ledger.chain import Ledger
from capsfl.ledger.statements import Registration, Revocation

LEFT = "left the run"


class MembershipError(ValueError):
    """Hospitals that are not those a run was begun with; the message names them and the remedy."""


def seat(roster: Sequence[str], hospitals: Sequence[str], *, places: int | None, folder: Path) -> tuple[str, ...]:
    """Returns who has, or once had, each place of a run: those before, then those who join now.

    Args:
        roster: of the start before; empty at the first.
        hospitals: that have records to train on now.
        places: how many the run has room for; None where nobody joins or leaves.
        folder: of the study, for messages.

    Raises:
        MembershipError: somebody joins or leaves and may not, or there is no place left.
    """
    joining = tuple(name for name in sorted(hospitals) if name not in roster)
    leaving = tuple(name for name in roster if name not in hospitals)
    if places is None and roster and (joining or leaving):
        changes = [f"{', '.join(names)} {verb}" for names, verb in ((joining, "joined"), (leaving, "left")) if names]
        raise MembershipError(
            f"{folder}: begun with the hospitals {', '.join(roster)}, and since then {' and '.join(changes)}; bring "
            "the data back to what it was, or begin another `out` with `places`, which lets hospitals join and leave"
        )
    if places is not None and len(roster) + len(joining) > places:
        raise MembershipError(
            f"places = {places}: {len(roster)} are taken, none of which is given away again, and {', '.join(joining)} "
            "would join; leave them out, or begin another `out` with more places"
        )
    return (*roster, *joining)


def record_members(
    ledger: Ledger, hospitals: Sequence[str], register: Callable[[str], Registration], checkpoints: Path
) -> None:
    """Enters who has joined and who has left since the ledger's last record.

    Args:
        ledger: of the run, open for writing.
        hospitals: that take part from now on.
        register: makes the registration of one that joins.
        checkpoints: folder of the run's checkpoints, by task.

    Raises:
        MembershipError: a hospital is back that has left, or a recorded round would have to be run again with others.
    """
    records = [record for block in ledger.blocks() for record in block.records]
    registered = {record.name: record.hospital_id for record in records if isinstance(record, Registration)}
    gone = {record.hospital for record in records if isinstance(record, Revocation)}
    for name in hospitals:
        if registered.get(name) in gone:
            raise MembershipError(
                f"{ledger.folder}: {name} has left this run and its key is revoked; it may come back under a new name"
            )
    joining = [name for name in hospitals if name not in registered]
    leaving = [name for name, key in registered.items() if name not in hospitals and key not in gone]
    if not joining and not leaving:
        return
    last = ledger.rounds()[-1] if ledger.rounds() else None
    if last is not None and not (checkpoints / last.task / str(last.round)).is_dir():
        raise MembershipError(
            f"{ledger.folder}: round {last.round} of {last.task} is recorded but has no checkpoint, so it will be run "
            f"again; start once with the hospitals as they were, before {', '.join([*joining, *leaving])} may change"
        )
    for name in joining:
        ledger.append(register(name))
    for name in leaving:
        ledger.append(Revocation(registered[name], LEFT))


def vacant_names(roster: Sequence[str], places: int) -> tuple[str, ...]:
    """Returns a name for every place; one that nobody has taken yet is named by its number."""
    return (*roster, *(f"(vacant {number})" for number in range(len(roster) + 1, places + 1)))


def members_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The roster in a study's record; older studies have the hospitals of their last start."""
    return tuple(record.get("roster") or record.get("hospitals") or ())
