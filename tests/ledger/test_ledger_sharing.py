"""A model asked for, granted under the owner's policy of that height, and sealed to the requester's key."""

from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfl.ledger import (
    AccessPolicy,
    Genesis,
    LedgerError,
    RecordError,
    Registration,
    RetrievalGrant,
    RetrievalRequest,
    Revocation,
    SealError,
    Signer,
    record_id,
    seal,
    unseal,
)
from capsfl.ledger import sealing as sealing_module
from capsfl.ledger.history import History
from capsfl.ledger.keys import chain_binding
from capsfl.ledger.records import from_canonical

CHAIN = "sharing-1"
OWNER = Signer((7).to_bytes(32, "big"))
BOUND = chain_binding(CHAIN, OWNER.public_key)
ASH, BIRCH, CEDAR = (Signer((300 + index).to_bytes(32, "big")) for index in range(3))
MODEL = "ab" * 32


def _history() -> History:
    history = History()
    members = [
        Registration.of(key, name, "lung CT", 3, BOUND)
        for name, key in (("ash", ASH), ("birch", BIRCH), ("cedar", CEDAR))
    ]
    history.extend(history.next_block((Genesis(CHAIN, OWNER.public_key), *members), OWNER))
    return history


def _extend(history: History, *records) -> None:
    history.extend(history.next_block(records, OWNER))


def _policy(version: int, *allowed: Signer, expires: int | None = None) -> AccessPolicy:
    ids = tuple(sorted(key.hospital_id() for key in allowed))
    return AccessPolicy(ASH.hospital_id(), "lung CT", version, ids, expires).signed(ASH, BOUND)


def _request(requester: Signer, nonce: int = 1) -> RetrievalRequest:
    bare = RetrievalRequest(requester.hospital_id(), ASH.hospital_id(), "lung CT", MODEL, f"{nonce:032x}")
    return bare.signed(requester, BOUND)


def _grant(request: RetrievalRequest, version: int, sealed: bytes = b"model") -> RetrievalGrant:
    return RetrievalGrant(ASH.hospital_id(), record_id(request), version, sha256(sealed).hexdigest()).signed(ASH, BOUND)


def test_a_request_is_granted_under_the_policy_and_the_sealed_model_opens_for_the_requester():
    pytest.importorskip("cryptography", reason="capsfl[secure] is not installed")
    history = _history()
    request = _request(BIRCH)
    sealed = seal(b"weights", BIRCH.public_key, chain_id=CHAIN, context=record_id(request))
    grant = _grant(request, 0, sealed)
    _extend(history, _policy(0, BIRCH))
    _extend(history, request)
    _extend(history, grant)
    assert history.index.grants[record_id(request)].sealed == sha256(sealed).hexdigest()
    assert unseal(sealed, BIRCH, chain_id=CHAIN, context=record_id(request)) == b"weights"
    for record in (_policy(0, BIRCH), request, grant):
        assert from_canonical(record.to_canonical()) == record


def test_a_grant_is_checked_against_the_policy_in_force_at_its_height():
    history = _history()
    request = _request(BIRCH)
    with pytest.raises(LedgerError, match="the policy in force is none"):
        _extend(history, request, _grant(request, 0))
    _extend(history, _policy(0, CEDAR))
    _extend(history, request)
    with pytest.raises(LedgerError, match="does not allow"):
        _extend(history, _grant(request, 0))
    _extend(history, _policy(1, BIRCH, CEDAR, expires=5))
    with pytest.raises(LedgerError, match="the policy in force is version 1"):
        _extend(history, _grant(request, 0))
    _extend(history, _grant(request, 1))  # block 4: the last the policy covers
    with pytest.raises(LedgerError, match="granted already"):
        _extend(history, replace(_grant(request, 1), sealed="00" * 32).signed(ASH, BOUND))
    later = _request(CEDAR, 2)
    with pytest.raises(LedgerError, match=r"does not allow .* at block 5"):
        _extend(history, later, _grant(later, 1))


def test_what_others_sign_for_the_owner_counts_nothing():
    history = _history()
    request = _request(BIRCH)
    _extend(history, _policy(0, BIRCH), request)
    policy = AccessPolicy(ASH.hospital_id(), "lung CT", 1, ())
    stranger = Signer((999).to_bytes(32, "big"))
    wrong_owner = RetrievalGrant(CEDAR.hospital_id(), record_id(request), 0, "00" * 32).signed(CEDAR, BOUND)
    for record, words in (
        (policy.signed(BIRCH, BOUND), r"policy\.signature"),
        (policy.signed(ASH, "another-chain"), r"policy\.signature"),
        (_policy(2), "the next version of this policy is 1"),
        (_policy(0, BIRCH, CEDAR), "the next version of this policy is 1"),
        (_policy(1, stranger), r"policy\.allowed: .* is not registered"),
        (replace(_grant(request, 0), signature="00" * 64), r"grant\.signature"),
        (wrong_owner, "no request to this hospital"),
        (_grant(_request(CEDAR, 9), 0), "no request to this hospital"),
        (replace(_request(CEDAR), nonce="12" * 16), r"request\.signature"),
        (replace(request, model="cd" * 32).signed(BIRCH, BOUND), "was used in block 1"),
        (request, "already in the chain"),
    ):
        with pytest.raises(LedgerError, match=words):
            _extend(history, record)


def test_a_revoked_requester_is_granted_nothing():
    history = _history()
    request = _request(BIRCH)
    _extend(history, _policy(0, BIRCH), request)
    _extend(history, Revocation(BIRCH.hospital_id(), "left the study"))
    with pytest.raises(LedgerError, match="was revoked in block 2"):
        _extend(history, _grant(request, 0))
    with pytest.raises(LedgerError, match="was revoked in block 2"):
        _extend(history, _request(BIRCH, 5))


@pytest.mark.parametrize(
    "fields",
    [
        {"version": -1}, {"version": True}, {"category": "../x"}, {"allowed": ["00" * 32]}, {"expires": -2},
        {"allowed": ("bb" * 32, "aa" * 32)}, {"allowed": ("aa" * 32, "aa" * 32)}, {"hospital": "ash"},
    ],
)  # fmt: skip
def test_a_policy_that_says_what_it_may_not_is_refused_by_field(fields):
    good = {"hospital": "aa" * 32, "category": "lung CT", "version": 0, "allowed": ()}
    with pytest.raises(RecordError, match=rf"policy\.{next(iter(fields))}"):
        AccessPolicy(**(good | fields))


@given(data=st.binary(max_size=300), flip=st.integers(0, 10_000))
@settings(max_examples=60)
def test_a_seal_opens_for_its_key_chain_and_context_and_for_nothing_else(data, flip):
    pytest.importorskip("cryptography", reason="capsfl[secure] is not installed")
    sealed = seal(data, BIRCH.public_key, chain_id=CHAIN, context="r1")
    assert len(sealed) == len(data) + sealing_module.OVERHEAD_BYTES
    assert unseal(sealed, BIRCH, chain_id=CHAIN, context="r1") == data
    changed = bytearray(sealed)
    changed[flip % len(sealed)] ^= 1 << flip % 8
    for bytes_, key, chain, context in (
        (sealed, CEDAR, CHAIN, "r1"),
        (sealed, BIRCH, "sharing-2", "r1"),
        (sealed, BIRCH, CHAIN, "r2"),
        (bytes(changed), BIRCH, CHAIN, "r1"),
        (sealed[:-1], BIRCH, CHAIN, "r1"),
        (b"", BIRCH, CHAIN, "r1"),
    ):
        with pytest.raises(SealError):
            unseal(bytes_, key, chain_id=chain, context=context)
    assert sealed != seal(data, BIRCH.public_key, chain_id=CHAIN, context="r1")  # a key of its own each time


def test_sealing_to_no_key_and_without_the_extra_says_what_to_do(monkeypatch):
    pytest.importorskip("cryptography", reason="capsfl[secure] is not installed")
    with pytest.raises(SealError, match="not a compressed point"):
        seal(b"", b"\x02" + b"\xff" * 32, chain_id=CHAIN, context="r")
    monkeypatch.setitem(__import__("sys").modules, "capsfl.ledger.curve_secure", None)
    for call in (
        lambda: seal(b"", BIRCH.public_key, chain_id=CHAIN, context="r"),
        lambda: unseal(b"", BIRCH, chain_id=CHAIN, context="r"),
    ):
        with pytest.raises(SealError, match=r"pip install 'capsfl\[secure\]'"):
            call()
