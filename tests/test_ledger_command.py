"""`capsfl ledger` through the real command line."""

import json
import shutil
from pathlib import Path

import pytest

from capsfl.cli import main
from capsfl.ledger import Ledger, Registration, RoundRecord, Signer, parameters_root, tensor_leaf

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
    member = Registration(key.hospital_id(), "ash", key.public_key, "lung CT", 4)
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
        (["tell"], "unknown action 'tell'; one of show, prove, check, export"),
        (["show", "EMPTY"], "no ledger here; name a run"),
        (["show", "NOISE"], "not an exported ledger"),
        (["prove", "STUDY", "OUT", "--task", "segmentation", "--round", "9"], "its rounds are 1 to 3"),
        (["prove", "STUDY", "OUT", "--task", "pruning", "--round", "1"], "it has none of this task"),
        (["check", "MISSING"], "No such file"),
        (["export", "STUDY", "MISSING/log"], "No such file"),
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
