import dataclasses
import os
import random

import pytest

from capsfl.ledger import Finding, Ledger, SignedHead, Status, chain_binding, storage, verify
from capsfl.ledger.log import parse_whole
from capsfl.ledger.manifests import Manifest

_CONFIGURATION = "0c" * 32


def _audit(folder, *, leaves=None, epsilon=None, configuration: str | None = _CONFIGURATION, **others) -> list[Finding]:
    return verify(
        folder,
        recompute_leaves=leaves or (lambda record: dict(record.leaves)),
        recompute_epsilon=epsilon or (lambda record: record.epsilon),
        configuration_hash=configuration,
        **others,
    )


def _but(findings: list[Finding], status: Status = Status.OK) -> list[Finding]:
    return [finding for finding in findings if finding.status is not status]


def _only(findings: list[Finding], check: str, round: int) -> Finding:
    (finding,) = (item for item in findings if (item.check, item.round) == (check, round))
    return finding


def _truncate(folder, size, owner):
    """What a thief of time does: the folder as it was `size` blocks long, head and all."""
    history = parse_whole(b"".join(storage.frame(block.encode()) for block in Ledger.open(folder).blocks()[:size]))
    (folder / "log").write_bytes(b"".join(storage.frame(block.encode()) for block in history.blocks))
    (folder / "head").write_bytes(history.head().encode())


def test_an_honest_ledger_is_ok_in_every_check_of_every_round(chain):
    findings = _audit(chain, witness_head=Ledger.open(chain).head().encode())
    assert _but(findings) == []
    assert [finding.check for finding in findings[:3]] == ["structure", "witness", "approvals"]
    checks = [(finding.check, finding.round, finding.task) for finding in findings[3:]]
    assert checks == [
        (check, number, "segmentation") for number in range(19) for check in ("tensors", "epsilon", "configuration")
    ]


def test_a_changed_tensor_is_named_with_its_first_round(chain, leaves_of):
    def swapped(record):
        return leaves_of(9.0) if record.round in (5, 6) else dict(record.leaves)

    bad = _but(_audit(chain, leaves=swapped), Status.OK)
    bad = [finding for finding in bad if finding.status is Status.FAILED]
    assert [(finding.check, finding.round, finding.leaf) for finding in bad] == [
        ("tensors", 5, "capsules/kernel"),
        ("tensors", 6, "capsules/kernel"),
    ]


@pytest.mark.parametrize(
    ("change", "leaf", "words"),
    [
        (lambda leaves: leaves.pop("head/bias"), "head/bias", "recorded but gone"),
        (lambda leaves: leaves.update(extra="00" * 32), "extra", "not recorded"),
        (lambda leaves: leaves.update(extra=None), "extra", "not recorded"),
        (lambda leaves: leaves.update({"head/bias": "00" * 32}), "head/bias", "not the recorded one"),
        (lambda leaves: leaves.update({"head/b": leaves.pop("head/bias")}), "head/b", "not recorded"),
        (lambda leaves: leaves.update({3: 4}), None, "cannot be read back"),
    ],
)
def test_tensors_that_are_gone_added_changed_or_renamed_fail(chain, change, leaf, words):
    def recompute(record):
        leaves = dict(record.leaves)
        change(leaves)
        return leaves

    finding = _only(_audit(chain, leaves=recompute), "tensors", 0)
    assert (finding.status, finding.leaf) == (Status.FAILED, leaf)
    assert words in finding.detail


def test_what_cannot_be_recomputed_is_unverifiable_never_ok(chain):
    findings = _audit(chain, leaves=lambda _: None, epsilon=lambda _: None, configuration=None)
    assert [f.check for f in findings if f.status is Status.OK] == ["structure", "approvals"]
    assert {f.status for f in findings if f.check not in ("structure", "approvals")} == {Status.UNVERIFIABLE}
    assert len(findings) == 3 + 3 * 19


def test_what_breaks_while_it_is_recomputed_fails_and_stops_nothing(chain):
    def broken(record):
        if record.round == 2:
            raise OSError("disk\nerror")
        return dict(record.leaves)

    def unable(record):
        return "lots" if record.round == 3 else record.epsilon

    bad = [finding for finding in _audit(chain, leaves=broken, epsilon=unable) if finding.status is Status.FAILED]
    assert [(finding.check, finding.round) for finding in bad] == [("tensors", 2), ("epsilon", 3)]
    assert bad[0].detail == "cannot be read back: OSError: disk error"


def test_an_understated_epsilon_fails_and_the_last_digits_of_a_platform_do_not(
    tmp_path, owner, registrations, round_record
):
    with Ledger.create(tmp_path / "l", signer=owner, chain_id="trial-1", registrations=registrations) as ledger:
        ledger.append(round_record(0, epsilon="2.0"))
        ledger.append(round_record(1, epsilon=None))
        ledger.append(round_record(2, epsilon=None, noise_multiplier=None))

    def epsilons(value):
        return [finding for finding in _audit(tmp_path / "l", epsilon=lambda _: value) if finding.check == "epsilon"]

    first, second, third = epsilons("2.5")
    assert "understated: recorded 2.0, recomputed 2.5" in first.detail
    assert {first.status, second.status, third.status} == {Status.FAILED}
    assert "overstated" in epsilons("1.5")[0].detail
    assert epsilons("2.0000000000001")[0].status is Status.OK
    assert epsilons("2.00001")[0].status is Status.FAILED
    assert [(finding.round, finding.status) for finding in epsilons(None)] == [
        (0, Status.UNVERIFIABLE),
        (1, Status.UNVERIFIABLE),
    ]


def test_another_configuration_fails(chain):
    finding = _only(_audit(chain, configuration="0d" * 32), "configuration", 4)
    assert finding.status is Status.FAILED


def test_a_manifest_alone_that_differs_is_a_warning(chain, owner, stranger):
    binding = chain_binding("trial-1", owner.public_key)
    record = Ledger.open(chain).find("segmentation", 0)
    assert record is not None
    files, contents = {"d/0": "00" * 32}, "22" * 32
    data = Manifest.of(record, contents, files, owner, binding).encode()
    assert Manifest.decode(data).encode() == data

    def check(data: bytes, found: dict[str, str], **others) -> Finding:
        given = {0: (data, found)}
        findings = _audit(chain, recompute_manifest=lambda record: given.get(record.round), **others)
        return _only(findings, "manifest", 0)

    assert check(data, files).status is Status.OK
    for other in ({"d/0": "11" * 32}, {"d/1": "00" * 32}, {}):
        changed = check(data, other)
        assert (changed.status, changed.leaf) == (Status.WARNING, "d/0")
    assert "agrees" not in check(data, {"d/0": "11" * 32}, leaves=lambda _: {}).detail
    later = Ledger.open(chain).find("segmentation", 1)
    assert later is not None
    for bad in (
        Manifest.of(record, contents, files, stranger, binding).encode(),
        Manifest.of(record, contents, files, owner, "another-chain").encode(),
        Manifest.of(later, contents, files, owner, binding).encode(),
        data.replace(b"d/0", b"d/1"),
        b"",
        b"{}",
    ):
        assert check(bad, files).status is Status.FAILED


def test_files_that_differ_or_are_not_signed_yet_are_judged_by_what_the_checkpoint_holds(chain, owner):
    binding = chain_binding("trial-1", owner.public_key)
    record = Ledger.open(chain).find("segmentation", 0)
    assert record is not None
    files, contents = {"d/0": "00" * 32}, "22" * 32
    manifests = {
        name: Manifest.of(record, contents, signed, owner, binding)
        for name, signed in (("whole", files), ("early", {}))
    }
    older = dataclasses.replace(manifests["whole"], contents=None).signed(owner, binding)

    def check(manifest: Manifest, found: dict[str, str], held: str | None, **others) -> tuple[Status, str]:
        def recompute(_):
            if held is None:
                raise OSError("unreadable")
            return held

        given = {0: (manifest.encode(), found)}
        finding = _only(
            _audit(chain, recompute_manifest=lambda r: given.get(r.round), recompute_contents=recompute, **others),
            "manifest",
            0,
        )
        return finding.status, finding.detail

    written_again = {"d/0": "11" * 32}
    assert check(manifests["whole"], files, None)[0] is Status.OK  # nothing has to be read
    assert check(manifests["whole"], written_again, contents) == (
        Status.WARNING,
        "file d/0 is not as it was written, though all that it holds agrees",
    )
    assert check(manifests["early"], files, contents) == (Status.OK, "holds what was signed before it was saved")
    for manifest in manifests.values():
        for bad, found in (("33" * 32, written_again), (None, written_again), ("33" * 32, {})):
            assert check(manifest, found, bad)[0] is Status.FAILED
    assert check(older, files, None)[0] is Status.OK
    assert check(older, written_again, None) == (
        Status.WARNING,
        "file d/0 is not as it was written, though every tensor agrees",
    )
    # A model that is another is its tensors' to say, and once.
    assert check(manifests["whole"], written_again, "33" * 32, leaves=lambda _: {})[0] is Status.WARNING


def test_a_rollback_of_the_whole_folder_shows_only_against_a_witness(chain, owner):
    witness = Ledger.open(chain).head().encode()
    _truncate(chain, 12, owner)
    alone = _but(_audit(chain))
    assert [(finding.check, finding.status) for finding in alone] == [("witness", Status.UNVERIFIABLE)]
    (finding,) = _but(_audit(chain, witness_head=witness))
    assert (finding.check, finding.status) == ("witness", Status.FAILED)
    assert "rolled back" in finding.detail


def test_a_rewritten_history_fails_against_a_witness_as_equivocation(chain, owner, round_record):
    early = Ledger.open(chain)
    witness = early.head().encode()
    _truncate(chain, 12, owner)
    with Ledger.open(chain, owner) as ledger:
        for number in range(11, 25):
            ledger.append(round_record(number, epsilon="11.5"))
    assert [finding.check for finding in _but(_audit(chain))] == ["witness"]
    (finding,) = _but(_audit(chain, witness_head=witness))
    assert finding.status is Status.FAILED
    assert "equivocation" in finding.detail
    _truncate(chain, 20, owner)
    assert SignedHead.decode(witness).contradicts(Ledger.open(chain).head())


def test_an_older_honest_witness_is_extended(chain):
    history = parse_whole(Ledger.open(chain).export())
    for size in range(1, 21):
        (finding,) = (f for f in _audit(chain, witness_head=history.head(size).encode()) if f.check == "witness")
        assert finding.status is Status.OK


def test_a_witness_head_that_is_forged_foreign_or_no_head_fails(chain, tmp_path, owner, stranger):
    head = Ledger.open(chain).head()
    with Ledger.create(tmp_path / "other", signer=stranger, chain_id="trial-1") as other:
        foreign = other.head().encode()
    for data in (
        b"",
        b"\xff" * 50,
        foreign,
        dataclasses.replace(head, size=5).encode(),
        dataclasses.replace(head, size=-1).encode(),
        dataclasses.replace(head, signature=b"").encode(),
        SignedHead.sign(owner, "trial-1", 0, head.root).encode(),
        SignedHead.sign(owner, "trial-2", 20, head.root).encode(),
    ):
        (finding,) = (finding for finding in _audit(chain, witness_head=data) if finding.check == "witness")
        assert finding.status is Status.FAILED


def test_only_rounds_before_the_first_damaged_block_are_vouched_for(chain):
    log = bytearray((chain / "log").read_bytes())
    log[log.index(b'"round":9')] ^= 1
    (chain / "log").write_bytes(bytes(log))
    findings = _audit(chain)
    assert findings[0].status is Status.FAILED
    assert "block 10" in findings[0].detail
    assert {finding.round for finding in findings[3:]} == set(range(9))


def test_hostile_folders_give_findings_and_no_exception(chain, tmp_path):
    log, head = (chain / "log").read_bytes(), (chain / "head").read_bytes()
    chance = random.Random(6)
    files = [
        (b"", b""),
        (log, b""),
        (b"", head),
        (chance.randbytes(5000), head),
        (head, log),
        (log[:-1], head),
    ]
    files += [
        (log, b"[" * 4000),
        (b"\xff" * 100, b'{"size":1}'),
        (log, head.replace(b'"size":20', b'"size":0')),
    ]
    files += [
        (log, head.replace(b'"size":20', b'"size":-3')),
        (log, head.replace(b'"size":20', b'"size":[]')),
    ]
    for content in files:
        (chain / "log").write_bytes(content[0])
        (chain / "head").write_bytes(content[1])
        findings = _audit(chain, witness_head=head)
        assert findings[0].check == "structure"
        assert findings[0].status is Status.FAILED
        assert all("\n" not in finding.detail for finding in findings)
    (chain / "head").write_bytes(head)
    (chain / "log").unlink()
    os.mkfifo(chain / "log")
    for folder in (chain, tmp_path / "nowhere", tmp_path / "a\x00b", chain / "head"):
        assert _audit(folder)[0].status is Status.FAILED
