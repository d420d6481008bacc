import dataclasses
import io
import os
import random
import struct
import subprocess
import sys
import zlib

import pytest

from capsfl.ledger import (
    Genesis,
    Ledger,
    Registration,
    SignedHead,
    Signer,
    canonical,
    chain_binding,
    merkle,
    save_key,
)
from capsfl.ledger.block import Block
from capsfl.ledger.errors import DamageError, Divergence, LedgerError, LockedError, StorageError
from capsfl.ledger.log import parse, parse_whole

_TORTURE = os.environ.get("CAPSFL_TORTURE") == "1"


def _payloads(log: bytes) -> list[bytes]:
    """Splits a log by its lengths alone, apart from the code under test."""
    payloads, offset = [], 0
    while offset < len(log):
        (size,) = struct.unpack_from(">I", log, offset)
        payloads.append(log[offset + 8 : offset + 8 + size])
        offset += 8 + size
    return payloads


def _frames(payloads: list[bytes]) -> bytes:
    def frame(payload: bytes) -> bytes:
        length = struct.pack(">I", len(payload))
        return length + struct.pack(">I", zlib.crc32(length + payload)) + payload

    return b"".join(map(frame, payloads))


def _first_bad_height(folder) -> int | None:
    with pytest.raises(DamageError) as caught:
        Ledger.open(folder)
    assert caught.value.height is None or f"block {caught.value.height}:" in str(caught.value)
    return caught.value.height


def test_a_ledger_opens_with_every_block_linked_signed_and_provable(chain, owner, round_record):
    ledger = Ledger.open(chain)
    blocks, head = ledger.blocks(), ledger.head()
    assert [block.height for block in blocks] == list(range(20))
    assert [block.previous for block in blocks[1:]] == [block.hash().hex() for block in blocks[:-1]]
    assert ledger.rounds() == tuple(round_record(number) for number in range(19))
    assert ledger.find("segmentation", 7) == round_record(7)
    assert ledger.find("segmentation", 19) is None
    assert ledger.find("classification", 7) is None
    assert (head.size, head.public_key, head.is_signed()) == (20, owner.public_key, True)
    assert head.root == merkle.root([block.hash() for block in blocks])
    hashes = [block.hash() for block in blocks]
    for block in blocks:
        proof = merkle.inclusion_proof(hashes, block.height)
        assert merkle.verify_inclusion(block.hash(), block.height, head.size, proof, head.root)
    old_root, proof = merkle.root(hashes[:13]), merkle.consistency_proof(hashes, 13)
    assert merkle.verify_consistency(13, 20, old_root, head.root, proof)


@pytest.mark.torture
def test_every_deletion_duplication_and_swap_in_20_blocks_is_refused_at_the_first_bad_height(chain):
    original = _payloads((chain / "log").read_bytes())
    assert len(original) == 20
    for i in range(20):
        (chain / "log").write_bytes(_frames(original[:i] + original[i + 1 :]))
        assert _first_bad_height(chain) == i
        (chain / "log").write_bytes(_frames(original[: i + 1] + original[i:]))
        assert _first_bad_height(chain) == i + 1
    pairs = [(i, j) for i in range(20) for j in range(i + 1, 20)]
    for i, j in pairs if _TORTURE else random.Random(1).sample(pairs, 40):
        swapped = list(original)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        (chain / "log").write_bytes(_frames(swapped))
        assert _first_bad_height(chain) == i


@pytest.mark.torture
def test_every_block_with_a_byte_changed_under_a_right_checksum_is_refused_at_its_height(chain):
    original = _payloads((chain / "log").read_bytes())
    chance = random.Random(2)
    for height, payload in enumerate(original):
        positions = range(len(payload)) if _TORTURE else chance.sample(range(len(payload)), 4)
        if height in (0, 2):  # the version's own digit is where another error is raised
            positions = [*positions, payload.index(b"block.v") + len(b"block.v")]
        for position in positions:
            changed = bytearray(payload)
            changed[position] ^= 1 << chance.randrange(8)
            log = _frames([*original[:height], bytes(changed), *original[height + 1 :]])
            _, _, fault = parse(io.BytesIO(log), 20)
            assert isinstance(fault, DamageError)
            assert fault.height == height


@pytest.mark.torture
def test_every_bit_flip_of_a_log_is_refused_at_the_height_it_hits(tmp_path, owner, round_record, registrations):
    folder = tmp_path / "ledger"
    with Ledger.create(folder, signer=owner, chain_id="trial-1", registrations=registrations) as ledger:
        ledger.append(round_record(0))
        ledger.append(round_record(1))
        log = ledger.export()
    ends = [sum(8 + len(payload) for payload in _payloads(log)[: index + 1]) for index in range(3)]
    bits = range(8 * len(log))
    for bit in bits if _TORTURE else random.Random(3).sample(bits, 300):
        flipped = bytearray(log)
        flipped[bit // 8] ^= 1 << bit % 8
        _, _, fault = parse(io.BytesIO(bytes(flipped)), 3)
        assert fault is not None
        assert fault.height == next(height for height, end in enumerate(ends) if bit // 8 < end)
    head = (folder / "head").read_bytes()
    bits = range(8 * len(head))
    for bit in bits if _TORTURE else random.Random(4).sample(bits, 200):
        flipped = bytearray(head)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / "head").write_bytes(bytes(flipped))
        with pytest.raises(DamageError):
            Ledger.open(folder)


def test_a_block_of_another_chain_or_another_history_is_refused(chain, tmp_path, owner, registrations_on, round_record):
    original = _payloads((chain / "log").read_bytes())
    for name, chain_id, value in (("other", "trial-2", None), ("same", "trial-1", 99.0)):
        with Ledger.create(
            tmp_path / name, signer=owner, chain_id=chain_id, registrations=registrations_on(chain_id)
        ) as other:
            for number in range(3):
                other.append(round_record(number, value=value if number == 2 else None))
        spliced = _payloads((tmp_path / name / "log").read_bytes())
        (chain / "log").write_bytes(_frames([*original[:3], spliced[3], *original[4:]]))
        height = _first_bad_height(chain)
        # The history that forks at round 2 gives a valid block 3: the next of ours does not follow it.
        assert height == (3 if name == "other" else 4)


def test_a_block_forged_with_another_key_is_refused(chain, owner, stranger, round_record):
    payloads = _payloads((chain / "log").read_bytes())
    history = parse_whole(_frames(payloads[:19]))
    block = history.next_block((round_record(18, epsilon="0.1"),), owner)
    history.extend(block)
    history = parse_whole(_frames(payloads[:19]))
    with pytest.raises(LedgerError, match="does not own"):
        history.next_block((round_record(18),), stranger)
    unsigned = SignedHead.sign(stranger, "trial-1", 20, b"\x00" * 32)
    for signature in (unsigned.signature, b"", b"\x00" * 64, block.signature[:63]):
        with pytest.raises(DamageError, match=r"block 19: .*signature") as caught:
            history.extend(dataclasses.replace(block, signature=signature))
        assert caught.value.height == 19
    assert len(history.blocks) == 19
    history.extend(block)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chain_id", "trial-2"),
        ("height", 21),
        ("previous", "00" * 32),
        ("records_root", "00" * 32),
        ("signer", "00" * 32),
    ],
)
def test_even_the_owner_cannot_sign_a_block_with_a_wrong_header(chain, owner, round_record, field, value):
    history = parse_whole((chain / "log").read_bytes())
    block = dataclasses.replace(history.next_block((round_record(19),), owner), **{field: value})
    root = merkle.root([*history.hashes, block.hash()])
    signature = SignedHead.sign(owner, "trial-1", 21, root).signature
    with pytest.raises(DamageError, match=f"block 20: {field} is"):
        history.extend(dataclasses.replace(block, signature=signature))
    assert len(history.blocks) == 20


@pytest.mark.parametrize("size", [1, 8, 19])
def test_a_log_cut_below_its_head_is_damage_never_a_shorter_ledger(chain, owner, size):
    payloads = _payloads((chain / "log").read_bytes())
    whole = _frames(payloads[:size])
    for cut in (whole, whole + _frames([payloads[size]])[:-1]):
        (chain / "log").write_bytes(cut)
        assert _first_bad_height(chain) == size
        with pytest.raises(DamageError):
            Ledger.open(chain, owner)
        assert (chain / "log").read_bytes() == cut


def test_a_torn_record_at_every_offset_is_dropped_and_a_whole_one_kept(tmp_path, owner, round_record, registrations):
    folder = tmp_path / "ledger"
    with Ledger.create(folder, signer=owner, chain_id="trial-1", registrations=registrations[:2]) as ledger:
        old_log, old_head = ledger.export(), (folder / "head").read_bytes()
        record = round_record(0, cohort=("north",))
        ledger.append(record)
        new_log, new_head = ledger.export(), (folder / "head").read_bytes()
    assert new_log.startswith(old_log)
    for size in range(len(old_log), len(new_log)):
        history, end, fault = parse(io.BytesIO(new_log[:size]), 1)
        assert (len(history.blocks), end, fault) == (1, len(old_log), None)
        if size % 50 == 1:
            with pytest.raises(DamageError, match="block 1"):
                parse_whole(new_log[:size])
    tails = [random.Random(5).randbytes(size) for size in (1, 7, 8, 9, 200)]
    tails += [new_log[len(old_log) : size] for size in (len(old_log) + 5, len(new_log) - 1)]
    # Power may fail with the length of the file on disk but not all of its pages.
    tails.append(new_log[len(old_log) : -100] + bytes(100))
    for tail in tails:
        (folder / "log").write_bytes(old_log + tail)
        (folder / "head").write_bytes(old_head)
        assert len(Ledger.open(folder).blocks()) == 1
        assert (folder / "log").read_bytes() == old_log + tail  # a reader mends nothing
        with Ledger.open(folder, owner) as ledger:
            assert (folder / "log").read_bytes() == old_log
            ledger.append(record)
        assert (folder / "log").read_bytes() == new_log
        assert (folder / "head").read_bytes() == new_head
    (folder / "head").write_bytes(old_head)  # the crash came between log and head
    with Ledger.open(folder, owner) as ledger:
        assert ledger.find("segmentation", 0) == record
    assert (folder / "head").read_bytes() == new_head


def test_a_whole_frame_that_is_no_next_block_is_damage_even_past_the_head(chain):
    with (chain / "log").open("ab") as log:
        log.write(_frames([_payloads((chain / "log").read_bytes())[5]]))
    assert _first_bad_height(chain) == 20


def test_hostile_lengths_are_refused_without_reading_them(chain):
    payloads = _payloads((chain / "log").read_bytes())
    for length in (0, (1 << 20) + 1, 2**32 - 1):
        (chain / "log").write_bytes(_frames(payloads[:2]) + struct.pack(">II", length, 0) + b"x" * 100)
        assert _first_bad_height(chain) == 2


def test_appending_a_record_again_returns_its_block_and_writes_nothing(chain, owner, round_record):
    before = (chain / "log").read_bytes()
    with Ledger.open(chain, owner) as ledger:
        assert ledger.append(round_record(4)) == ledger.blocks()[5]
        assert ledger.append(round_record(18)) == ledger.blocks()[19]
    assert (chain / "log").read_bytes() == before


def test_a_rerun_that_differs_names_the_round_and_the_first_tensor_or_field(chain, owner, round_record):
    before = (chain / "log").read_bytes()
    with Ledger.open(chain, owner) as ledger:
        with pytest.raises(
            Divergence, match=r"^task segmentation, round 4: tensor capsules/kernel is not the recorded"
        ):
            ledger.append(round_record(4, value=4.5))
        with pytest.raises(Divergence, match=r"^task segmentation, round 4: epsilon is 0\.1, recorded is 4\.5"):
            ledger.append(round_record(4, epsilon="0.1"))
        assert ledger.append(round_record(19)).height == 20
    assert (chain / "log").read_bytes().startswith(before)


def test_rounds_go_up_name_registered_hospitals_and_hospitals_register_once(chain, owner, registrations, round_record):
    def renamed(name: str, seed: int) -> Registration:
        signer = Signer(seed.to_bytes(32, "big"))
        return Registration.of(signer, name, "lung CT", 1, chain_binding("trial-1", owner.public_key))

    first = registrations[0]
    with Ledger.open(chain, owner) as ledger:
        ledger.append(round_record(25))
        for record, complaint in (
            (round_record(24), "comes after round 25"),
            (round_record(26, cohort=("nowhere",)), "'nowhere' is not registered"),
            (round_record(26, cohort=("north", first.hospital_id)), "named twice"),
            (renamed("NORTH", 50), "already registered"),
            (renamed("öst", 51), "already registered"),
            (renamed(first.hospital_id, 52), "already registered"),
            (dataclasses.replace(first, name="west"), "already registered"),
            (Genesis("trial-1", owner.public_key), None),
            (Genesis("trial-2", owner.public_key), "genesis"),
        ):
            size = len(ledger.blocks())
            if complaint is None:
                assert ledger.append(record).height == 0
            else:
                with pytest.raises(LedgerError, match=complaint):
                    ledger.append(record)
            assert len(ledger.blocks()) == size
        ledger.append(renamed("west", 53))
        ledger.append(round_record(26, cohort=("west", first.hospital_id)))
        ledger.append(round_record(0, task="classification"))
    assert len(Ledger.open(chain).blocks()) == 24


def test_a_chain_begins_with_one_genesis_and_no_block_is_empty(owner, registrations):
    genesis = Genesis("trial-1", owner.public_key)
    for records in ((), registrations, (genesis, genesis), (registrations[0], genesis)):
        leaves = [merkle.leaf_hash(canonical.encode(record.to_canonical())) for record in records]
        unsigned = Block("trial-1", 0, "0" * 64, merkle.root(leaves).hex(), owner.hospital_id(), tuple(records), b"")
        head = SignedHead.sign(owner, "trial-1", 1, merkle.root([unsigned.hash()]))
        block = dataclasses.replace(unsigned, signature=head.signature)
        with pytest.raises(DamageError, match=r"block 0: .*(genesis|at least one)"):
            parse_whole(_frames([block.encode()]))
    with pytest.raises(DamageError, match="not a block"):
        parse_whole(_frames([b'{"header":{}}']))


def test_two_writers_never_share_a_ledger(chain, owner, tmp_path):
    save_key(owner, tmp_path / "key.pem")
    script = (
        "import sys; from capsfl.ledger import Ledger, LockedError, load_key\n"
        "try: Ledger.open(sys.argv[1], load_key(sys.argv[2]))\n"
        "except LockedError as error: print(error)\n"
        "else: print('opened')\n"
    )
    command = [sys.executable, "-c", script, str(chain), str(tmp_path / "key.pem")]

    def other_process() -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with Ledger.open(chain, owner):
        with pytest.raises(LockedError, match="another writer"):
            Ledger.open(chain, owner)
        assert "another writer" in other_process()
        assert len(Ledger.open(chain).blocks()) == 20  # readers need no lock
    assert other_process() == "opened\n"
    Ledger.open(chain, owner).close()


def test_only_the_owner_writes_and_only_while_the_ledger_is_open(chain, owner, stranger, round_record):
    with pytest.raises(LedgerError, match="does not own"):
        Ledger.open(chain, stranger)
    with pytest.raises(LedgerError, match="reading only"):
        Ledger.open(chain).append(round_record(19))
    with Ledger.open(chain, owner) as ledger:
        pass
    with pytest.raises(LedgerError, match="reading only"):
        ledger.append(round_record(19))
    assert len(ledger.blocks()) == 20


def test_a_checkpoint_alone_rebuilds_the_ledger(chain, tmp_path, owner, stranger):
    data = Ledger.open(chain).export()
    with Ledger.restore(tmp_path / "new" / "ledger", data, signer=owner) as ledger:
        assert ledger.head() == Ledger.open(chain).head()
    for name in ("log", "head"):
        assert (tmp_path / "new" / "ledger" / name).read_bytes() == (chain / name).read_bytes()
    with pytest.raises(LedgerError, match="does not own"):
        Ledger.restore(tmp_path / "theirs", data, signer=stranger)
    for broken, height in ((b"", 0), (data[:-1], 19), (data + b"\x00", 20), (data[1:], 0)):
        with pytest.raises(DamageError) as caught:
            Ledger.restore(tmp_path / "broken", broken, signer=owner)
        assert caught.value.height == height
        assert not Ledger.exists(tmp_path / "broken")


def test_on_resume_the_longer_of_one_history_stays(chain, tmp_path, owner, round_record):
    payloads = _payloads((chain / "log").read_bytes())
    older = _frames(payloads[:12])
    with Ledger.restore(chain, older, signer=owner) as ledger:
        assert len(ledger.blocks()) == 20
    with Ledger.restore(tmp_path / "behind", older, signer=owner) as ledger:
        assert len(ledger.blocks()) == 12
    with Ledger.restore(tmp_path / "behind", _frames(payloads), signer=owner) as ledger:
        assert len(ledger.blocks()) == 20
        ledger.append(round_record(19))
    assert len(Ledger.open(tmp_path / "behind").blocks()) == 21


def test_on_resume_a_forked_history_is_a_divergence_that_names_round_and_tensor(chain, tmp_path, owner, round_record):
    payloads = _payloads((chain / "log").read_bytes())
    before = (chain / "log").read_bytes()
    with Ledger.restore(tmp_path / "fork", _frames(payloads[:12]), signer=owner) as fork:
        fork.append(round_record(11, value=0.0))
        data, head = fork.export(), fork.head()
    with pytest.raises(Divergence, match=r"^task segmentation, round 11: tensor capsules/kernel is not the recorded"):
        Ledger.restore(chain, data, signer=owner)
    with Ledger.create(tmp_path / "else", signer=owner, chain_id="trial-9") as other:
        elsewhere = other.export()
    with pytest.raises(Divergence, match="block 0"):
        Ledger.restore(chain, elsewhere, signer=owner)
    assert (chain / "log").read_bytes() == before
    # The owner signed two heads of 13 blocks: portable evidence.
    ours = parse_whole(_frames(payloads[:13])).head()
    assert ours.contradicts(head)
    assert head.contradicts(ours)
    assert not ours.contradicts(ours)
    assert not ours.contradicts(dataclasses.replace(head, signature=ours.signature))
    assert not ours.contradicts(parse_whole(_frames(payloads[:12])).head())


def test_a_second_beginning_in_a_folder_is_refused(chain, tmp_path, owner):
    with pytest.raises(LedgerError, match="already holds a ledger"):
        Ledger.create(chain, signer=owner, chain_id="trial-1")
    (chain / "head").unlink()
    assert not Ledger.exists(chain)
    before = (chain / "log").read_bytes()
    with pytest.raises(LedgerError, match="log without its head"):
        Ledger.create(chain, signer=owner, chain_id="trial-1")
    with pytest.raises(LedgerError, match="no ledger here"):
        Ledger.open(chain, owner)
    assert (chain / "log").read_bytes() == before
    with Ledger.restore(chain, before, signer=owner) as ledger:
        assert len(ledger.blocks()) == 20
    with pytest.raises(LedgerError, match="no ledger here"):
        Ledger.open(tmp_path / "nowhere", owner)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["log", "head", "lock"])
@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder", "gone"])
def test_links_pipes_and_folders_in_the_place_of_files_are_refused(chain, owner, name, kind):
    (chain / name).rename(chain / "moved")
    if kind == "symlink":
        (chain / name).symlink_to(chain / "moved")
    elif kind == "fifo":
        os.mkfifo(chain / name)
    elif kind == "folder":
        (chain / name).mkdir()
    if name == "lock" and kind == "gone":
        Ledger.open(chain, owner).close()
    else:
        with pytest.raises(LedgerError) as caught:
            Ledger.open(chain, owner)
        assert str(chain) in str(caught.value)


def test_heads_that_are_no_heads_are_refused(chain):
    head = (chain / "head").read_bytes()
    assert SignedHead.decode(head).encode() == head
    for data in (b"", b"{}", b"[]", b"null", head + b"\n", head.replace(b'"size":20', b'"size":true')):
        with pytest.raises(LedgerError):
            SignedHead.decode(data)
    for size in (b"0", b"-1", b"19", b"21"):
        (chain / "head").write_bytes(head.replace(b'"size":20', b'"size":' + size))
        with pytest.raises(DamageError):
            Ledger.open(chain)
    (chain / "head").write_bytes(b"x" * 5000)
    with pytest.raises(StorageError, match="larger than"):
        Ledger.open(chain)
