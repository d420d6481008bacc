"""The ledger: what recording a round costs, and how fast an auditor reads a chain back."""

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from capsfl.bench.ledger_overhead import measure_overhead
from capsfl.bench.machine import describe
from capsfl.ledger import curve_ecdsa, keys, storage
from capsfl.ledger.assembly import assemble_round
from capsfl.ledger.consensus import ConsensusRules
from capsfl.ledger.history import History
from capsfl.ledger.keys import Curve, Signer
from capsfl.ledger.log import parse_whole
from capsfl.ledger.proofs import check_proof, prove
from capsfl.ledger.records import Genesis, RoundRecord, parameters_root, tensor_leaf
from capsfl.ledger.statements import Registration

MEMBERS = 8
"""Hospitals of the chain, all of them in every round."""
TENSORS = 28
"""Tensors of the model, as SegCaps has them."""


@dataclass(frozen=True)
class LedgerBench:
    """Rounds recorded and verified a minute, with and without the members' consensus, on both curves."""

    quick: bool = False
    """A few rounds: seconds instead of minutes."""


def measure(options: LedgerBench, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Builds chains and reads them back.

    Returns:
        The result, JSON-ready: the machine, and a row per way to decide and per curve: milliseconds of process CPU
        to record a round, rounds verified a minute of process CPU, bytes of a round and of a proof; and what records
        cost the rounds of a training that they are made beside.
    """
    rows = []
    for decided, rules in (("owner", None), ("members", ConsensusRules(quorum="two_thirds"))):
        for curve in _curves():
            with _computing(curve):
                rounds = 10 if options.quick else (1000 if rules is None else 200)
                history, recording = _build(rules, rounds)
                data = b"".join(storage.frame(block.encode()) for block in history.blocks)
                start = time.process_time()
                parse_whole(data)
                verifying = time.process_time() - start
                proof = prove(history, history.blocks[-1].records[-1])
                check_proof(proof)
            name = curve.__name__.rpartition("_")[2]  # pyright: ignore[reportAttributeAccessIssue] both are modules
            rows.append(
                {
                    "decided": decided,
                    "curve": {"secure": "cryptography"}.get(name, name),
                    "rounds": rounds,
                    "signatures": sum(_signatures(block) for block in history.blocks[1:]) / rounds,
                    "record_cpu_s": recording / rounds,
                    "verified_per_cpu_minute": 60 * rounds / verifying,
                    "round_bytes": len(data) / rounds,
                    "proof_bytes": len(proof),
                    "path_bytes": 32 * (len(history.blocks) - 1).bit_length(),
                }
            )
            say(f"ledger, decided by {decided}, {rows[-1]['curve']}")
    return {
        "benchmark": "ledger",
        "quick": options.quick,
        "machine": describe(),
        "members": MEMBERS,
        "rows": rows,
        "overhead": measure_overhead(quick=options.quick, say=say),
    }


def _curves() -> list[Curve]:
    found: list[Curve] = [curve_ecdsa]
    if keys.default_curve() is not curve_ecdsa:
        found.append(keys.default_curve())
    return found


@contextmanager
def _computing(curve: Curve) -> Iterator[None]:
    """Has every signature made and checked by one curve."""
    chosen = keys.default_curve
    keys.default_curve = lambda: curve  # pyright: ignore[reportAttributeAccessIssue] the cache's own methods are not used
    try:
        yield
    finally:
        keys.default_curve = chosen


def _build(rules: ConsensusRules | None, rounds: int) -> tuple[History, float]:
    owner = Signer((7).to_bytes(32, "big"))
    members = [Signer((200 + index).to_bytes(32, "big")) for index in range(MEMBERS)]
    names = [f"hospital-{index}" for index in range(MEMBERS)]
    registrations = [
        Registration.of(member, name, "lung CT", 9, keys.chain_binding("bench", owner.public_key))
        for member, name in zip(members, names, strict=True)
    ]
    signers = {member.hospital_id(): member for member in members}
    history = History()
    stated = () if rules is None else (rules,)
    history.extend(history.next_block((Genesis("bench", owner.public_key), *stated, *registrations), owner))
    records = [_record(number, names) for number in range(1, rounds + 1)]
    errors = {voter: {other: 0.25 for other in signers if other != voter} for voter in signers}
    start = time.process_time()
    for record in records:
        if rules is None:
            history.extend(history.next_block((record,), owner))
            continue
        updates = dict.fromkeys(signers, record.parameters_digest)
        height = len(history.blocks)
        proposal = assemble_round(record, history.index, height, signers=signers, updates=updates, errors=errors)
        history.extend(history.next_block(proposal, owner, members))
    return history, time.process_time() - start


def _record(number: int, names: list[str]) -> RoundRecord:
    leaves = {
        f"layer-{index}/kernel": tensor_leaf(f"layer-{index}/kernel", "float32", (1,), struct.pack("<f", number)).hex()
        for index in range(TENSORS)
    }
    return RoundRecord(
        round=number,
        task="segmentation",
        parameters_digest=parameters_root(leaves),
        leaves=tuple(sorted(leaves.items())),
        cohort=tuple(names),
        sampler="all",
        clip_norm="1.0",
        noise_multiplier="1.1",
        expected_cohort="8.0",
        epsilon=f"{number}.5",
        delta="1e-05",
        configuration_hash="0c" * 32,
        code_version="0.1.0",
    )


def _signatures(block: Any) -> int:
    fields = ("signature", "countersignature", "possession")
    own = sum(bool(getattr(record, field, "")) for record in block.records for field in fields)
    return 1 + len(block.approvals) + own
