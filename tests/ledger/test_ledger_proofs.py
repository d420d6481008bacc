import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfl.ledger import Ledger, LedgerError, RoundRecord, canonical
from capsfl.ledger.log import survey
from capsfl.ledger.proofs import check_proof, prove


@pytest.fixture(scope="module")
def history(_chain_of_twenty):
    return survey(_chain_of_twenty)[0]


def test_every_record_of_a_ledger_is_provable_by_itself(history):
    for height, block in enumerate(history.blocks):
        for record in block.records:
            proof = check_proof(prove(history, record))
            assert (proof.record, proof.height, proof.head) == (record, height, history.head())


def test_a_record_that_is_not_there_has_no_proof(history, round_record):
    with pytest.raises(LedgerError, match="no such record"):
        prove(history, round_record(50))


@given(st.data())
@settings(max_examples=150)
def test_a_changed_proof_shows_nothing(history, data):
    value = json.loads(prove(history, history.blocks[7].records[0]))
    spots = [("record", "epsilon"), ("record", "round"), ("header", "height"), ("header", "records_root"),
             ("header", "chain_id"),
             ("head", "size"), ("head", "root"), ("head", "signature"), ("head", "public_key"), ("head", "chain_id"),
             ("position",), ("records",), ("block_path",), ("record_path",), ("type",)]  # fmt: skip
    *trail, last = data.draw(st.sampled_from(spots))
    place = value
    for key in trail:
        place = place[key]
    old = place[last]
    if isinstance(old, list):
        place[last] = data.draw(st.sampled_from([old[:-1] if old else ["00" * 32], [*old, "00" * 32], 7, "x"]))
    elif isinstance(old, int):
        place[last] = old + data.draw(st.sampled_from([-1, 1, 1000]))
    else:
        at = data.draw(st.integers(0, len(old) - 1))
        place[last] = old[:at] + ("1" if old[at] != "1" else "2") + old[at + 1 :]
    with pytest.raises(LedgerError):
        check_proof(canonical.encode(value))


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_no_proof(data):
    with pytest.raises(LedgerError):
        check_proof(data)


def test_the_path_to_one_of_1000_blocks_is_at_most_320_bytes(tmp_path, owner, registrations, round_record):
    from capsfl.ledger.history import History
    from capsfl.ledger.records import Genesis

    history = History()
    history.extend(history.next_block((Genesis("trial-1", owner.public_key), *registrations), owner))
    for number in range(999):
        history.extend(history.next_block((round_record(number),), owner))
    sizes = []
    for height in (0, 1, 511, 512, 997, 999):
        proof = prove(history, history.blocks[height].records[0])
        assert check_proof(proof).height == height
        sizes.append(32 * len(json.loads(proof)["block_path"]))
    assert max(sizes) <= 320


def test_an_exported_ledger_gives_the_same_proofs(chain, history):
    ledger = Ledger.open(chain)
    record = ledger.rounds()[3]
    assert isinstance(record, RoundRecord)
    assert prove(survey(chain)[0], record) == prove(history, record)
