"""From DICOM to the page and back: train, report, verify, predict, each through the real command line."""

import json
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import orbax.checkpoint as ocp
import pytest

from capsfl.checkpoint import read_parameters
from capsfl.ct.dicom import read_dicom
from capsfl.ct.nifti import RAS_TO_LPS, REVERSE
from capsfl.ledger.chain import Ledger
from capsfl.ledger.keyfiles import load_key

pytestmark = pytest.mark.journey


def test_the_page_stands_on_its_own_and_shows_the_controls_beside_the_result(study):
    page = (study.run / "report.html").read_text()
    outside = [link for link in re.findall(r'(?:src|href)="([^"]*)"', page) if not link.startswith(("data:", "#"))]
    assert outside == [], "a page that needs other files or the network"
    assert not re.search(r"@import|url\((?!['\"]?(data:|#))", page)
    for control in ("always positive", "permuted labels", "HU threshold", "dense lung fraction"):
        assert control in page


def test_results_say_what_the_page_draws(study):
    results = json.loads((study.run / "federated" / "results.json").read_text())
    assert {row["patient"] for row in results["classification"]["scores"]} == {"A-002", "C-002"}
    assert 0 <= results["segmentation"]["overall"]["dice"] <= 1
    assert results["classification"]["controls"]["always positive"]["sensitivity"] == 1
    assert results["privacy"]["unit"] == "hospital"
    lines = [json.loads(line) for line in (study.run / "federated" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["task"], row["round"]) for row in lines] == [
        ("segmentation", 1), ("segmentation", 2), ("classification", 1), ("classification", 2),
    ]  # fmt: skip
    epsilons = [row["epsilon"] for row in lines]
    assert epsilons == sorted(epsilons), "privacy is spent, never regained"
    assert epsilons[-1] == pytest.approx(results["privacy"]["epsilon"])


def test_the_page_is_written_again_from_the_folder_alone(study_copy: Path, capsfl):
    page = study_copy / "report.html"
    before = page.read_text()
    page.unlink()
    picture = study_copy.parent / "summary.png"
    capsfl("report", study_copy, "--picture", picture)
    assert len(page.read_text()) == pytest.approx(len(before), rel=0.02)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_prediction_lies_on_the_series_own_grid(study, phantom: Path, tmp_path: Path, capsfl):
    series = phantom / "hospital-A" / "A-002"
    capsfl("predict", study.run, series, "--out", tmp_path)
    scan = read_dicom(series)
    place = tmp_path / "A-002"
    row = json.loads((place / "prediction.json").read_text())
    assert row["notice"] == "not for clinical use"
    assert 0 <= row["probability"] <= 1
    for name in ("mask", "probability"):
        image = nibabel.Nifti1Image.from_filename(place / f"{name}.nii.gz")
        assert image.shape == scan.source.shape[::-1]
        np.testing.assert_allclose(
            np.asarray(image.affine), RAS_TO_LPS @ np.array(scan.source.affine) @ REVERSE, atol=1e-4
        )
    mask = np.asarray(nibabel.Nifti1Image.from_filename(place / "mask.nii.gz").dataobj)
    probability = np.asarray(nibabel.Nifti1Image.from_filename(place / "probability.nii.gz").dataobj)
    assert set(np.unique(mask)) <= {0, 1}
    assert np.all(probability[mask == 1] > row["threshold"])
    assert row["mask_ml"] == pytest.approx(mask.sum() * np.prod(scan.spacing_mm) / 1000)
    assert (place / "overlay.png").read_bytes().startswith(b"\x89PNG")


def test_an_untouched_study_verifies_and_says_so_in_json(study, capsfl):
    answer = json.loads(capsfl("verify", study.run, "--json").out)
    assert answer["ok"] is True
    statuses = {(row["check"], row["status"]) for row in answer["runs"]["federated"]}
    assert statuses == {
        ("structure", "OK"), ("witness", "UNVERIFIABLE"), ("tensors", "OK"), ("epsilon", "OK"),
        ("configuration", "OK"), ("mechanism", "OK"), ("coverage", "OK"), ("identity", "OK"),
        ("sequence", "OK"), ("approvals", "OK"), ("manifest", "OK"),
    }  # fmt: skip


def failures(answer: str) -> list[dict]:
    """The failed findings of `verify --json`."""
    return [row for row in json.loads(answer)["runs"]["federated"] if row["status"] == "FAILED"]


def test_one_flipped_bit_in_a_checkpoint_is_named(study_copy: Path, here):
    data = study_copy / "federated/checkpoints/segmentation/2/state/ocdbt.process_0/d"
    file = max(data.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    answer = here("verify", study_copy, "--json", expect=1)
    (finding,) = failures(answer.out)
    assert (finding["check"], finding["task"], finding["round"]) == ("tensors", "segmentation", 2)
    # Within an array's bytes the flip shows as another tensor; within the store's own, the round is unreadable.
    assert finding["leaf"] in leaves(study_copy, 2) or "segmentation/2: checkpoint unreadable" in finding["detail"]


def leaves(run: Path, round_number: int) -> set[str]:
    """Tensors of a segmentation round, whether or not it can be read back."""
    metadata = json.loads((run / f"federated/checkpoints/segmentation/{round_number}/state/_METADATA").read_text())
    paths = [[key["key"] for key in row["key_metadata"]] for row in metadata["tree_metadata"].values()]
    return {".".join(path[1:]) for path in paths if path[0] == "parameters"}


def test_one_weight_changed_by_the_smallest_step_is_named_with_its_tensor(study_copy: Path, here):
    place = study_copy / "federated/checkpoints/segmentation/1/state"
    leaf = sorted(leaves(study_copy, 1))[3]
    with ocp.StandardCheckpointer() as files:
        tree = files.restore(place)
        weights = np.array(tree["parameters"][leaf])
        weights.flat[0] = np.nextafter(weights.flat[0], np.float32(np.inf))
        tree["parameters"][leaf] = weights
        shutil.rmtree(place)
        files.save(place, tree)
    assert (read_parameters(place.parent.parent, 1) or {})[leaf].flat[0] == weights.flat[0]
    answer = here("verify", study_copy, expect=1)
    assert f"tensors segmentation round 1 {leaf}: tensor {leaf} is not the recorded one" in answer.out


def frames(log: bytes) -> list[bytes]:
    """The log cut into its frames."""
    found = []
    while log:
        length = 8 + int.from_bytes(log[:4], "big")
        found.append(log[:length])
        log = log[length:]
    return found


def test_a_record_removed_from_the_ledger_is_named(study_copy: Path, here):
    log = study_copy / "federated/ledger/log"
    blocks = frames(log.read_bytes())
    assert len(blocks) == 5  # the founding block and four rounds
    log.write_bytes(b"".join(blocks[:2] + blocks[3:]))
    answer = failures(here("verify", study_copy, "--json", expect=1).out)
    assert answer[0]["check"] == "structure"
    assert answer[0]["detail"].startswith("block 2: ")
    lost = {(row["task"], row["round"]) for row in answer if row["check"] == "coverage"}
    assert lost == {("segmentation", 2), ("classification", 1)}


def test_a_rollback_shows_against_a_head_kept_elsewhere(study, study_copy: Path, tmp_path: Path, here):
    """Whoever owns the key can sign a shorter history, drop its checkpoints, and look whole."""
    witness = tmp_path / "head"
    shutil.copy(study.run / "federated/ledger/head", witness)
    assert here("verify", study_copy, "--witness", witness).code == 0
    ledger = study_copy / "federated/ledger"
    log = ledger / "log"
    log.write_bytes(b"".join(frames(log.read_bytes())[:4]))
    (ledger / "head").unlink()
    resign(study_copy)
    shutil.rmtree(study_copy / "federated/checkpoints/classification/2")
    assert here("verify", study_copy).code == 0, "without a witness nothing can show"
    answer = here("verify", study_copy, "--witness", witness, expect=1)
    assert "the witness saw 5 blocks, this ledger has 4: it was rolled back" in answer.out


def test_files_written_again_are_a_warning_which_strict_does_not_let_pass(study_copy: Path, here):
    (study_copy / "federated/checkpoints/segmentation/1/note.txt").write_text("by somebody")
    answer = here("verify", study_copy)
    assert "warning: file note.txt is not as it was written, though all that it holds agrees" in answer.out
    assert "strict" in here("verify", study_copy, "--strict", expect=1).out


def resign(run: Path) -> None:
    """Has the owner sign the log as it is now."""
    ledger = run / "federated/ledger"
    data = (ledger / "log").read_bytes()
    (ledger / "log").unlink()
    Ledger.restore(ledger, data, signer=load_key(run / "federated/keys/owner.pem")).close()
    assert (ledger / "log").read_bytes() == data


def test_epsilon_answers_in_flat_json(capsfl, here):
    answer = json.loads(
        capsfl(
            "epsilon", "--hospitals", "100", "--cohort", "10", "--noise-multiplier", "1.1",
            "--rounds", "50", "--delta", "1e-3", "--json",
        ).out
    )  # fmt: skip
    assert not [value for value in answer.values() if isinstance(value, dict | list)]
    assert {"epsilon", "relation", "unit", "accountant"} <= answer.keys()
    assert 0 < answer["epsilon"] < 10
    solved = json.loads(
        here(
            "epsilon", "--hospitals", "100", "--cohort", "10", "--rounds", "50", "--delta", "1e-3",
            "--target-epsilon", str(answer["epsilon"]), "--json",
        ).out
    )  # fmt: skip
    assert solved["noise_multiplier"] == pytest.approx(1.1, rel=0.02)


def test_the_doctor_names_the_devices(capsfl):
    answer = capsfl("doctor")
    assert "cpu" in answer.out
    assert "orbax-checkpoint" in answer.out
