"""`capsfl ledger show|prove|check|export|witness`: reading a run's ledger, and taking parts of it away."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from capsfl.arguments import parse
from capsfl.ledger.block import Block, SignedHead
from capsfl.ledger.canonical import MAX_BYTES
from capsfl.ledger.errors import LedgerError, VersionError
from capsfl.ledger.history import History
from capsfl.ledger.keyfiles import open_key
from capsfl.ledger.keys import hospital_id
from capsfl.ledger.log import parse_whole, survey
from capsfl.ledger.proofs import check_proof, prove
from capsfl.ledger.records import Record, RoundRecord
from capsfl.ledger.storage import frame, read_whole, replace
from capsfl.ledger.witness import check_evidence, cosign, evidence, extends, read_cosignature, read_head

_MAX_EXPORT = 1 << 30


@dataclass(frozen=True)
class ShowCommand:
    """Print the blocks of a ledger; damaged ones end the list, with exit code 1."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder, its ledger folder, a study's folder with one run, or an exported ledger."""
    json: bool = False
    """Print every record as JSON, one block a line."""


@dataclass(frozen=True)
class ProveCommand:
    """Write a proof that a round is recorded: a small file that anybody checks without the ledger."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder, its ledger folder, a study's folder with one run, or an exported ledger."""
    out: Annotated[Path, tyro.conf.Positional]
    """File for the proof."""
    task: str
    """Task of the round, such as segmentation."""
    round: int
    """Number of the round, from 1."""


@dataclass(frozen=True)
class CheckCommand:
    """Check a proof that `capsfl ledger prove` wrote, from the record up to the signed head."""

    proof: Annotated[Path, tyro.conf.Positional]
    """The proof."""
    owner: str | None = None
    """Hospital id of the key that must have signed; whose key it is, a proof alone cannot tell."""


@dataclass(frozen=True)
class ExportCommand:
    """Write a whole ledger, checked, into one file that `show` and `prove` read, and its head beside it."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder, its ledger folder, or a study's folder with one run."""
    out: Annotated[Path, tyro.conf.Positional]
    """File for the log; the head, which a witness keeps, goes to the same name with .head."""


@dataclass(frozen=True)
class WitnessCommand:
    """Sign a ledger's head as a witness, check what a witness signed, or hold two heads against each other.

    With --key the ledger is checked and its head cosigned into --out; a head that lies there must be extended by the
    ledger. With --against two heads are compared: two of one size with different roots prove that the owner told two
    stories, and --out keeps the proof. Without either, a cosigned head or such a proof is checked. Exit code 1 where
    anything does not hold.
    """

    place: Annotated[Path, tyro.conf.Positional]
    """A run, ledger or exported ledger to sign; else a head, a cosigned head or a proof of two stories."""
    out: Path | None = None
    """File for the cosigned head, or for the proof."""
    key: Path | None = None
    """The witness's key, a PEM file; made, for its owner alone to read, where there is none."""
    against: Path | None = None
    """Another head."""
    witness: str | None = None
    """Hospital id of the witness that must have signed."""


def run(words: Sequence[str]) -> int:
    """Runs one of the ledger's commands; exit code 1 where a ledger or proof does not hold."""
    if not words or words[0] in ("-h", "--help"):
        print("capsfl ledger show|prove|check|export|witness; each has its own --help.")
        return 0 if words else 2
    action = _ACTIONS.get(words[0])
    if action is None:
        raise ValueError(f"capsfl ledger: unknown action {words[0]!r}; one of {', '.join(_ACTIONS)}")
    form, run = action
    return run(parse(form, words[1:], prog=f"capsfl ledger {words[0]}"))


def find_ledger(place: Path) -> Path:
    """Returns the ledger folder, or exported file, that a path means.

    Raises:
        LedgerError: none there, or a study of several runs.
    """
    if place.is_file() or (place / "head").exists():
        return place
    found = [place / "ledger"] if (place / "ledger").is_dir() else sorted(place.glob("**/ledger/head"))
    if not found:
        raise LedgerError(f"{place}: no ledger here; name a run that `capsfl train` wrote, or an exported ledger")
    if len(found) > 1:
        runs = ", ".join(str(head.parent.parent.relative_to(place)) for head in found)
        raise LedgerError(f"{place}: {len(found)} runs with a ledger each; name one of {runs}")
    return found[0].parent if found[0].name == "head" else found[0]


def read_ledger(place: Path) -> tuple[History, LedgerError | None]:
    """Returns as much of a ledger as holds, and its first fault."""
    where = find_ledger(place)
    if where.is_file():
        try:
            return parse_whole(read_whole(where, _MAX_EXPORT)), None
        except LedgerError as error:
            raise LedgerError(f"{where}: not an exported ledger ({error})") from None
    history, _, fault = survey(where)
    if isinstance(fault, VersionError):
        raise VersionError(f"{where}: {fault}")
    return history, fault


def show(given: ShowCommand) -> int:
    """Prints the blocks."""
    history, fault = read_ledger(given.run)
    console = Console()
    if given.json:
        for block in history.blocks:
            console.print(json.dumps(_block_row(block)), soft_wrap=True, highlight=False, markup=False)
    else:
        table = Table("height", "block", "holds", "round", "epsilon", "approvals", box=None, pad_edge=False)
        for block in history.blocks:
            rounds = [record for record in block.records if isinstance(record, RoundRecord)]
            moment = ", ".join(f"{record.task} {record.round}" for record in rounds)
            epsilon = ", ".join(str(record.epsilon)[:8] for record in rounds if record.epsilon is not None)
            table.add_row(
                str(block.height),
                block.hash().hex()[:12],
                _holds(block.records),
                escape(moment),
                epsilon,
                str(len(block.approvals) or "-"),
            )
        console.print(table)
        if history.blocks:
            head = history.head()
            console.print(f"head: {head.size} blocks, root {head.root.hex()}", soft_wrap=True, highlight=False)
            owner = hospital_id(head.public_key)
            console.print(f"chain {head.chain_id}, owner {owner}", soft_wrap=True, highlight=False)
    if fault is not None:
        console.print(f"[red]damaged[/] {escape(str(fault))}", soft_wrap=True, highlight=False)
        return 1
    return 0


def write_proof(given: ProveCommand) -> int:
    """Writes a proof of one round."""
    history, fault = read_ledger(given.run)
    record = history.rounds.get((given.task, given.round))
    if record is None:
        if fault is not None:
            raise fault
        numbers = [number for task, number in history.rounds if task == given.task]
        known = f"its rounds are {numbers[0]} to {numbers[-1]}" if numbers else "it has none of this task"
        raise LedgerError(f"{given.run}: no record of {given.task} round {given.round}; {known}")
    data = prove(history, record)
    replace(given.out, data)
    print(f"proof: {given.out}, {len(data)} bytes, under a head of {len(history.blocks)} blocks")
    return 0


def check(given: CheckCommand) -> int:
    """Checks a proof."""
    data = read_whole(given.proof, 1 << 20)
    try:
        proof = check_proof(data)
    except VersionError as error:
        raise VersionError(f"{given.proof}: {error}") from None
    except LedgerError as error:
        print(f"FAILED {given.proof}: {error}")
        return 1
    signer = hospital_id(proof.head.public_key)
    if given.owner is not None and given.owner != signer:
        print(f"FAILED {given.proof}: signed by {signer}, not by {given.owner}")
        return 1
    print(json.dumps(proof.record.to_canonical(), indent=1))
    print(f"OK: block {proof.height} of {proof.head.size} of chain {proof.head.chain_id}, signed by {signer} alone")
    return 0


def export(given: ExportCommand) -> int:
    """Writes a ledger into one file and its head beside it."""
    history, fault = read_ledger(given.run)
    if fault is not None:
        raise fault
    head = given.out.with_name(given.out.name + ".head")
    replace(given.out, b"".join(frame(block.encode()) for block in history.blocks))
    replace(head, history.head().encode())
    print(f"ledger: {given.out}, {len(history.blocks)} blocks\nhead: {head}, for `capsfl verify RUN --witness`")
    return 0


def witness(given: WitnessCommand) -> int:
    """Signs, checks or compares heads."""
    if given.key is not None:
        return _cosign(given.place, given.key, given.out)
    data = read_whole(given.place, MAX_BYTES)
    try:
        if given.against is not None:
            return _compare(_named(read_head, given.place), _named(read_head, given.against), given.out)
        if b'"heads":' in data:
            first, second = check_evidence(data)
            print(f"OK: {hospital_id(first.public_key)} signed two histories of {first.size} blocks of one chain,")
            print(f"roots {first.root.hex()} and {second.root.hex()}")
            return 0
        head, public_key = read_cosignature(data)
    except LedgerError as error:
        print(f"FAILED {given.place}: {error}")
        return 1
    signer = hospital_id(public_key)
    if given.witness not in (None, signer):
        print(f"FAILED {given.place}: cosigned by {signer}, not by {given.witness}")
        return 1
    print(f"OK: {head.size} blocks of chain {head.chain_id}, root {head.root.hex()},")
    print(f"signed by {hospital_id(head.public_key)}, cosigned by {signer}")
    return 0


def _cosign(place: Path, key: Path, out: Path | None) -> int:
    if out is None:
        raise LedgerError("capsfl ledger witness --key: give --out, the file for the cosigned head")
    history, fault = read_ledger(place)
    if fault is not None:
        raise fault
    if out.exists():
        seen = _named(read_head, out)
        found = extends(history, seen)
        if found is not None:
            print(f"FAILED {place}: {found}; {out} is left as it was")
            return 1
    signer = open_key(key)
    replace(out, cosign(history.head(), signer))
    print(f"cosigned: {out}, {len(history.blocks)} blocks, by {signer.hospital_id()}")
    return 0


def _compare(first: SignedHead, second: SignedHead, out: Path | None) -> int:
    if first.contradicts(second):
        print(f"EQUIVOCATION: {hospital_id(first.public_key)} signed two histories of {first.size} blocks")
        if out is not None:
            replace(out, evidence(first, second))
            print(f"proof: {out}")
        return 1
    if (first.chain_id, first.public_key) != (second.chain_id, second.public_key):
        print("the heads are of two chains: they say nothing about each other")
    elif first.size == second.size:
        print(f"OK: both heads are of the same {first.size} blocks")
    else:
        print(f"heads of {first.size} and {second.size} blocks: only the ledger tells whether one extends the other")
    return 0


def _named(read: Callable[[bytes], SignedHead], place: Path) -> SignedHead:
    try:
        return read(read_whole(place, MAX_BYTES))
    except LedgerError as error:
        text = str(error)
        raise LedgerError(text if text.startswith(str(place)) else f"{place}: {text}") from None


def _holds(records: Sequence[Record]) -> str:
    kinds = [record.type for record in records]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _block_row(block: Block) -> dict[str, Any]:
    return {
        **block.header(),
        "hash": block.hash().hex(),
        "records": [record.to_canonical() for record in block.records],
        "approvals": dict(block.approvals),
    }


_ACTIONS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "show": (ShowCommand, show),
    "prove": (ProveCommand, write_proof),
    "check": (CheckCommand, check),
    "export": (ExportCommand, export),
    "witness": (WitnessCommand, witness),
}
