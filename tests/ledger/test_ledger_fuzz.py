"""Bytes from strangers: whatever they are, a reader answers with a value or a named refusal, soon and in little memory.

Two thousand inputs under `make test`, a hundred thousand under `make torture`, from one seed. An input is a valid one
with bits, bytes, values or whole parts changed; where bytes have a checksum it is made good again, and records go as
far as the rules of a chain whose owner signs whatever he is given.
"""

import io
import json
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from capsfl.ledger import (
    AccessPolicy,
    ConsensusRules,
    Genesis,
    LedgerError,
    Registration,
    RetrievalGrant,
    RetrievalRequest,
    Revocation,
    Rotation,
    SignedHead,
    Signer,
    canonical,
    chain_binding,
    record_id,
    seal,
    unseal,
)
from capsfl.ledger.assembly import assemble_round
from capsfl.ledger.block import Block
from capsfl.ledger.history import History
from capsfl.ledger.log import parse, parse_whole
from capsfl.ledger.manifests import Manifest
from capsfl.ledger.proofs import check_proof, prove
from capsfl.ledger.records import from_canonical
from capsfl.ledger.storage import frame
from capsfl.ledger.witness import check_evidence, cosign, evidence, read_head

TORTURE = os.environ.get("CAPSFL_TORTURE") == "1"
INPUTS = 100_000 if TORTURE else 2_000
BOUND = chain_binding("trial-1", Signer((7).to_bytes(32, "big")).public_key)

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 2**53, 2**53 - 1, -(2**63), 10**400, 0.5, 1e308, "", " ", "0", "-0", "1e-400", "nan",
    "Infinity", "9" * 5000, "\x00", "\ud800", "\u202e", "../x", "ä" * 200, "a/b", "ff" * 32, "FF" * 32, "00" * 64,
    [], [[]], [[[[[[[[[]]]]]]]]], ["a"] * 300, [["a", "b"]] * 40, {}, {"a": {}}, {"type": "round"}, [None] * 40,
)  # fmt: skip
BYTES = (
    b"", b"\x00", b"\xff" * 40, b'"', b"[" * 4000, b'{"a":' * 4000, b"9" * 5000, b"NaN", b"1e999", b"\\ud800",
    b"\\u0000", b'{"a":1,"a":2}',
    b"\xef\xbb\xbf", b" ", b"\n", b'"\\', (2**32 - 1).to_bytes(4, "big"), b"-", b"0" * 300,
)  # fmt: skip


class Stranger:
    """Makes bytes that are nearly right."""

    def __init__(self, seed: int, samples: dict[str, list[bytes]]) -> None:
        self.chance = random.Random(seed)
        self.samples = samples
        self.all = [sample for group in samples.values() for sample in group]

    def bytes_like(self, kind: str) -> bytes:
        """A sample of a kind, changed once or a few times."""
        data = self.chance.choice(self.samples[kind])
        for _ in range(1 if self.chance.random() < 0.7 else self.chance.randint(2, 6)):
            data = self.chance.choice((self._bit, self._cut, self._splice, self._insert, self._value, self._value))(
                data
            )
        return data

    def _bit(self, data: bytes) -> bytes:
        changed = bytearray(data or b"\x00")
        for _ in range(self.chance.choice((1, 1, 3))):
            changed[self.chance.randrange(len(changed))] ^= 1 << self.chance.randrange(8)
        return bytes(changed)

    def _cut(self, data: bytes) -> bytes:
        start, end = sorted(self.chance.randrange(len(data) + 1) for _ in range(2))
        return self.chance.choice((data[:start], data[end:], data[:start] + data[end:], data + data[start:end]))

    def _splice(self, data: bytes) -> bytes:
        other = self.chance.choice(self.all)
        return data[: self.chance.randrange(len(data) + 1)] + other[self.chance.randrange(len(other) + 1) :]

    def _insert(self, data: bytes) -> bytes:
        place = self.chance.randrange(len(data) + 1)
        return data[:place] + self.chance.choice(BYTES) + data[place:]

    def _value(self, data: bytes) -> bytes:
        """Another value, key or type somewhere in a JSON document, written as the canonical form would be."""
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return self._bit(data)
        value = self._changed(value)
        return json.dumps(value, sort_keys=self.chance.random() < 0.95, separators=(",", ":")).encode()

    def _changed(self, value: Any) -> Any:
        chance = self.chance
        if isinstance(value, dict) and value and chance.random() < 0.85:
            key = chance.choice(sorted(value))
            action = chance.random()
            if action < 0.1:
                return {name: item for name, item in value.items() if name != key}
            if action < 0.15:
                return value | {chance.choice(("extra", "type", "ä", "manifest", "work")): chance.choice(HOSTILE)}
            return value | {key: self._changed(value[key])}
        if isinstance(value, list) and value and chance.random() < 0.8:
            place, action = chance.randrange(len(value)), chance.random()
            if action < 0.1:
                return value[:place] + value[place + 1 :]
            if action < 0.2:
                return [*value, value[place]]
            if action < 0.3:
                return chance.sample(value, len(value))
            return [*value[:place], self._changed(value[place]), *value[place + 1 :]]
        if isinstance(value, str) and value and chance.random() < 0.5:
            place = chance.randrange(len(value))
            return value[:place] + chance.choice("0123456789abcdefg.-/ \u00e4") + value[place + 1 :]
        if isinstance(value, int) and chance.random() < 0.5:
            return value + chance.choice((-1, 1, 2**31))
        return chance.choice(HOSTILE)


@pytest.fixture(scope="module")
def members() -> list[Signer]:
    return [Signer((400 + index).to_bytes(32, "big")) for index in range(3)]


@pytest.fixture(scope="module")
def history(owner: Signer, members: list[Signer], round_record: Callable[..., Any]) -> History:
    """A chain with every kind of record in it."""
    chain, ids = History(), [member.hospital_id() for member in members]
    names = ("ash", "birch", "cedar")
    joined = [Registration.of(m, name, "lung CT", 5, BOUND) for m, name in zip(members, names, strict=True)]
    rules = ConsensusRules(quorum="two_thirds", margin=None, byzantine=0)

    def extend(*records: Any) -> None:
        chain.extend(chain.next_block(records, owner, members))

    extend(Genesis("trial-1", owner.public_key), rules, *joined)
    errors = {voter: {other: 0.25 for other in ids if other != voter} for voter in ids}
    record = round_record(1, cohort=names, patients=tuple((name, 4, "1.5") for name in names))
    updates = dict.fromkeys(ids, "ab" * 32)
    signers = dict(zip(ids, members, strict=True))
    extend(*assemble_round(record, chain.index, 1, signers=signers, updates=updates, errors=errors))
    policy = AccessPolicy(ids[0], "lung CT", 0, tuple(sorted(ids[1:])), 9).signed(members[0], BOUND)
    request = RetrievalRequest(ids[1], ids[0], "lung CT", "ab" * 32, "12" * 16).signed(members[1], BOUND)
    grant = RetrievalGrant(ids[0], record_id(request), 0, "cd" * 32).signed(members[0], BOUND)
    extend(policy, request, grant)
    newer = Signer((500).to_bytes(32, "big"))
    extend(Rotation(ids[1], newer.public_key, "34" * 16).signed(members[1], BOUND).proven(newer, BOUND))
    extend(Revocation(ids[2], "left"))
    return chain


@pytest.fixture(scope="module")
def readers(history: History, owner: Signer, members: list[Signer]) -> dict[str, tuple[list[bytes], Callable]]:
    """Samples of what strangers send, by kind, and what reads it."""
    records = [record for block in history.blocks for record in block.records]
    log = b"".join(frame(block.encode()) for block in history.blocks)
    other = SignedHead.sign(owner, "trial-1", len(history.blocks), b"\x01" * 32)
    files = {"a/b": "00" * 32, "c": "11" * 32}
    manifest = Manifest.of(history.rounds["segmentation", 1], "22" * 32, files, owner, BOUND)

    def admit(data: bytes) -> None:
        """A record that the owner signs, whatever it says, as far as the rules."""
        record = from_canonical(canonical.decode(data))
        base = parse_whole(log[: sum(len(frame(block.encode())) for block in history.blocks[:2])])
        base.next_block((record,), owner, members)

    def read_manifest(data: bytes) -> None:
        found = Manifest.decode(data)
        found.check(history.rounds["segmentation", 1], owner.public_key, BOUND)

    def read_log(data: bytes) -> None:
        found, end, fault = parse(io.BytesIO(data), 2)
        assert end <= len(data)
        assert all(mine.hash() == theirs.hash() for mine, theirs in zip(found.blocks, history.blocks, strict=False))
        if fault is not None:
            raise fault

    def read_framed(data: bytes) -> None:
        read_log(frame(history.blocks[0].encode()) + frame(data))

    found: dict[str, tuple[list[bytes], Callable]] = {
        "canonical": ([canonical.encode(record.to_canonical()) for record in records], canonical.decode),
        "record": ([canonical.encode(record.to_canonical()) for record in records], admit),
        "block": ([block.encode() for block in history.blocks], Block.decode),
        "framed block": ([block.encode() for block in history.blocks], read_framed),
        "log": ([log, frame(history.blocks[0].encode())], read_log),
        "head": ([history.head().encode(), cosign(history.head(), members[0])], read_head),
        "proof": ([prove(history, record) for record in (records[0], records[-1])], check_proof),
        "evidence": ([evidence(history.head(), other)], check_evidence),
        "manifest": ([manifest.encode()], read_manifest),
    }
    try:
        sealed = seal(b"weights" * 20, members[0].public_key, chain_id="trial-1", context="r")
    except LedgerError:
        return found  # capsfl[secure] is not installed
    found["sealed"] = ([sealed], lambda data: unseal(data, members[0], chain_id="trial-1", context="r"))
    return found


@pytest.mark.torture
def test_strangers_bytes_get_a_value_or_a_named_refusal_in_bounded_time_and_memory(readers):
    stranger = Stranger(6, {kind: samples for kind, (samples, _) in readers.items()})
    outcomes: Counter[str] = Counter()
    slowest, memory = 0.0, _peak_bytes()
    for number in range(INPUTS):
        kind = list(readers)[number % len(readers)]
        data = stranger.bytes_like(kind)
        refusal, start = "", time.process_time()
        try:
            readers[kind][1](data)
        except LedgerError as error:
            refusal = str(error)
        slowest = max(slowest, time.process_time() - start)
        outcomes[f"{kind}: {'refused' if refusal else 'read'}"] += 1
        assert "\n" not in refusal, data
        assert len(refusal) < 2_000, data
    memory = _peak_bytes() - memory
    print(f"{INPUTS} inputs, slowest {slowest:.3f} s, {memory / 2**20:.1f} MiB more in all: {dict(outcomes)}")
    assert all(outcomes[f"{kind}: refused"] > INPUTS / len(readers) / 2 for kind in readers)
    assert memory < 256 * 2**20
    assert not TORTURE or slowest < 10


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
