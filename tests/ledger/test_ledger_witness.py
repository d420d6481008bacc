"""A head that a witness signed too, and proof against an owner who tells two stories."""

from dataclasses import replace

import pytest

from capsfl.ledger import Ledger, LedgerError, SignedHead, canonical
from capsfl.ledger.log import parse_whole
from capsfl.ledger.witness import check_evidence, cosign, evidence, extends, read_cosignature, read_head


def test_a_cosigned_head_reads_back_and_no_changed_one_does(chain, owner, stranger):
    head = Ledger.open(chain).head()
    data = cosign(head, stranger)
    assert read_cosignature(data) == (head, stranger.public_key)
    assert read_head(data) == read_head(head.encode()) == head
    value = canonical.decode(data)
    for changed in (
        value | {"public_key": owner.public_key.hex()},
        value | {"signature": head.signature.hex()},
        value | {"signature": 7},
        value | {"signature": "no hex"},
        value | {"head": value["head"] | {"size": 19}},
        value | {"head": []},
        value | {"extra": 1},
        {"type": value["type"], "head": value["head"]},
    ):
        with pytest.raises(LedgerError):
            read_head(canonical.encode(changed))
    forged = replace(head, signature=bytes(64))
    for bad in (cosign(forged, stranger), forged.encode(), b"", b"[]", b"{}"):
        with pytest.raises(LedgerError):
            read_head(bad)


def test_an_approval_out_of_the_log_is_no_cosignature_and_a_cosignature_no_approval(chain, stranger):
    head = Ledger.open(chain).head()
    value = canonical.decode(cosign(head, stranger))
    assert not head.is_approved(stranger.public_key, bytes.fromhex(value["signature"]))
    assert head.is_approved(stranger.public_key, head.approve(stranger))
    with pytest.raises(LedgerError, match="not that of the witness"):
        read_cosignature(canonical.encode(value | {"signature": head.approve(stranger).hex()}))


def test_two_heads_of_one_size_prove_equivocation_and_no_other_two_do(chain, tmp_path, owner, round_record):
    first = Ledger.open(chain).head()
    history = parse_whole(Ledger.open(chain).export())
    second = SignedHead.sign(owner, "trial-1", 20, b"\x01" * 32)
    data = evidence(first, second)
    assert check_evidence(data) == (first, second)
    assert extends(history, first) is None
    assert "equivocation" in str(extends(history, second))
    for other in (first, history.head(19), replace(second, signature=bytes(64)), replace(second, chain_id="trial-2")):
        with pytest.raises(LedgerError, match="do not contradict each other"):
            evidence(first, other)
        heads = [canonical.decode(head.encode()) for head in (first, other)]
        with pytest.raises(LedgerError):
            check_evidence(canonical.encode({"type": "equivocation.v1", "heads": heads}))
    for bad in (b"{}", canonical.encode({"type": "equivocation.v1", "heads": []}), data[:-1]):
        with pytest.raises(LedgerError):
            check_evidence(bad)
