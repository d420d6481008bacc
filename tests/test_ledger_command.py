"""`capsfl ledger` through the real command line."""

import io
import json
import shutil
from pathlib import Path

import pytest

from capsfl.cli import main
from capsfl.ledger import (
    Ledger,
    Registration,
    RoundRecord,
    Signer,
    chain_binding,
    load_key,
    parameters_root,
    tensor_leaf,
)
from capsfl.ledger.storage import frame, read_frame

OWNER = Signer((7).to_bytes(32, "big"))


def _round(number: int) -> RoundRecord:
    leaves = {"bias": tensor_leaf("bias", "float32", (1,), bytes([number, 0, 0, 0])).hex()}
    return RoundRecord(
        number, "segmentation", parameters_root(leaves), tuple(leaves.items()), ("ash",), "poisson", "1.0", "1.1",
        "1.0", "0.5", "1e-05", "0c" * 32, "0.1.0",
    )  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder as `capsfl train` leaves it, as far as ledgers go: one arm with three rounds."""
    folder = tmp_path_factory.mktemp("study")
    key = Signer((8).to_bytes(32, "big"))
    member = Registration.of(key, "ash", "lung CT", 4, chain_binding("c", OWNER.public_key))
    (folder / "federated").mkdir()
    with Ledger.create(folder / "federated" / "ledger", signer=OWNER, chain_id="c", registrations=[member]) as ledger:
        for number in (1, 2, 3):
            ledger.append(_round(number))
    return folder


def run(capsys, *words: object) -> tuple[int, str, str]:
    """The exit code, output and error of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["ledger", *map(str, words)])
    out, error = capsys.readouterr()
    return int(end.value.code or 0), out, error


def test_show_lists_the_blocks_of_a_study_a_run_or_an_export(study, tmp_path, capsys):
    code, out, _ = run(capsys, "show", study)
    assert code == 0
    assert "segmentation 3" in out
    assert "head: 4 blocks" in out
    assert run(capsys, "show", study / "federated")[1] == out == run(capsys, "show", study / "federated/ledger")[1]
    assert run(capsys, "export", study, tmp_path / "log")[0] == 0
    assert run(capsys, "show", tmp_path / "log")[1] == out
    assert (tmp_path / "log.head").read_bytes() == (study / "federated/ledger/head").read_bytes()
    rows = [json.loads(line) for line in run(capsys, "show", study, "--json")[1].splitlines()]
    assert [row["height"] for row in rows] == [0, 1, 2, 3]
    assert rows[2]["records"][0]["round"] == 2


def test_a_proof_checks_without_the_ledger_and_not_after_a_change(study, tmp_path, capsys):
    proof = tmp_path / "proof.json"
    code, out, _ = run(capsys, "prove", study, proof, "--task", "segmentation", "--round", 2)
    assert (code, out) == (0, f"proof: {proof}, {proof.stat().st_size} bytes, under a head of 4 blocks\n")
    code, out, _ = run(capsys, "check", proof, "--owner", OWNER.hospital_id())
    assert code == 0
    assert "OK: block 2 of 4 of chain c" in out
    assert run(capsys, "check", proof, "--owner", "ab" * 32)[0] == 1
    proof.write_bytes(proof.read_bytes().replace(b'"epsilon":"0.5"', b'"epsilon":"0.4"'))
    code, out, _ = run(capsys, "check", proof)
    assert (code, out) == (1, f"FAILED {proof}: the record is not under its block's records root\n")


def test_a_damaged_ledger_shows_what_holds_and_ends_with_1(study, tmp_path, capsys):
    copy = Path(shutil.copytree(study, tmp_path / "copy"))
    log = copy / "federated/ledger/log"
    data = bytearray(log.read_bytes())
    data[-40] ^= 1
    log.write_bytes(data)
    code, out, _ = run(capsys, "show", copy)
    assert code == 1
    assert "segmentation 2" in out
    assert "segmentation 3" not in out
    assert "damaged block 3" in out
    code, _, error = run(capsys, "export", copy, tmp_path / "log")
    assert code == 2
    assert "block 3" in error
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tell"], "unknown action 'tell'; one of show, prove, check, export, witness"),
        (["show", "EMPTY"], "no ledger here; name a run"),
        (["show", "NOISE"], "not an exported ledger"),
        (["prove", "STUDY", "OUT", "--task", "segmentation", "--round", "9"], "its rounds are 1 to 3"),
        (["prove", "STUDY", "OUT", "--task", "pruning", "--round", "1"], "it has none of this task"),
        (["check", "MISSING"], "No such file"),
        (["export", "STUDY", "MISSING/log"], "No such file"),
        (["witness", "STUDY", "--key", "OUT"], "give --out"),
        (["witness", "MISSING"], "No such file"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(study, tmp_path, capsys, words, message):
    (tmp_path / "noise").write_bytes(b"\x00" * 50)
    (tmp_path / "empty").mkdir()
    places = {"STUDY": study, "EMPTY": tmp_path / "empty", "NOISE": tmp_path / "noise", "OUT": tmp_path / "out"}
    filled = [str(places.get(w, w.replace("MISSING", str(tmp_path / "missing")))) for w in words]
    code, _, error = run(capsys, *filled)
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_two_runs_in_one_study_are_named(study, tmp_path, capsys):
    copy = Path(shutil.copytree(study, tmp_path / "copy"))
    shutil.copytree(copy / "federated", copy / "pooled")
    code, _, error = run(capsys, "show", copy)
    assert code == 2
    assert "2 runs with a ledger each; name one of federated, pooled" in error


def test_a_witness_signs_what_extends_the_head_it_signed_before_and_nothing_else(study, tmp_path, capsys):
    out, key = tmp_path / "kept", tmp_path / "keys" / "witness.pem"
    code, text, _ = run(capsys, "witness", study, "--key", key, "--out", out)
    assert (code, text.split(", by ")[0]) == (0, f"cosigned: {out}, 4 blocks")
    assert key.stat().st_mode & 0o777 == 0o600
    signer = load_key(key).hospital_id()
    code, text, _ = run(capsys, "witness", out, "--witness", signer)
    assert code == 0
    assert f"cosigned by {signer}" in text
    assert run(capsys, "witness", out, "--witness", "ab" * 32)[0] == 1
    copy = Path(shutil.copytree(study, tmp_path / "copy"))
    with Ledger.open(copy / "federated/ledger", OWNER) as ledger:
        ledger.append(_round(4))
    assert run(capsys, "witness", copy, "--key", key, "--out", out)[0] == 0
    kept = out.read_bytes()
    code, text, _ = run(capsys, "witness", study, "--key", key, "--out", out)
    assert code == 1
    assert "saw 5 blocks, this ledger has 4: it was rolled back" in text
    assert out.read_bytes() == kept, "the later head stays"


def test_two_stories_of_an_owner_are_proven_from_two_heads(study, tmp_path, capsys):
    heads, proof = [], tmp_path / "proof"
    for name, number in (("one", 4), ("two", 5)):
        copy = Path(shutil.copytree(study, tmp_path / name))
        with Ledger.open(copy / "federated/ledger", OWNER) as ledger:
            ledger.append(_round(number))
        heads.append(copy / "federated/ledger/head")
    code, text, _ = run(capsys, "witness", *heads[:1], "--against", heads[1], "--out", proof)
    assert code == 1
    assert text.startswith(f"EQUIVOCATION: {OWNER.hospital_id()} signed two histories of 5 blocks")
    code, text, _ = run(capsys, "witness", proof)
    assert code == 0
    assert "signed two histories of 5 blocks" in text
    proof.write_bytes(proof.read_bytes().replace(b'"size":5', b'"size":6'))
    assert run(capsys, "witness", proof)[0] == 1
    code, text, _ = run(capsys, "witness", heads[0], "--against", study / "federated/ledger/head")
    assert (code, text) == (0, "heads of 5 and 4 blocks: only the ledger tells whether one extends the other\n")


@pytest.mark.parametrize("words", [["show", "RUN"], ["prove", "RUN", "OUT", "--task", "segmentation", "--round", "1"]])
def test_a_ledger_of_another_version_gets_one_line_and_exit_code_2(study, tmp_path, capsys, words):
    copy = Path(shutil.copytree(study, tmp_path / "copy"))
    log = copy / "federated/ledger/log"
    payload = io.BytesIO(log.read_bytes())
    first = read_frame(payload)
    assert first is not None
    log.write_bytes(frame(first.replace(b"block.v2", b"block.v3")))
    places = {"RUN": copy, "OUT": tmp_path / "out"}
    code, _, error = run(capsys, *(places.get(word, word) for word in words))
    assert code == 2
    assert len(error.splitlines()) == 1
    assert "written by a newer version of capsfl (block.v3, this one reads block.v2)" in error
