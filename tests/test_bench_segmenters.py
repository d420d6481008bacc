"""`capsfl bench segmenters`: one budget for all, scores of what was never trained on, refusals that name the file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import nibabel
import numpy as np
import pytest
from flax import nnx

from capsfl.bench import page, segmenter_picture, segmenters
from capsfl.bench.segmenter_controls import fit_middle, mark_lungs, mark_middle
from capsfl.bench.segmenter_data import Fold, SegmenterDataError, leave_one_out, read_lungs, read_tumours
from capsfl.bench.segmenter_scores import compare, crossed_interval, judge_goal, score_masks, summarize
from capsfl.bench.segmenter_search import search_rate
from capsfl.bench.segmenter_training import Marked, SegmenterTrainingConfig, Trained, draw_order
from capsfl.bench.segmenters import NETWORKS, SegmentersBench, network_config
from capsfl.cli import main
from capsfl.learning.patients import Patient
from capsfl.learning.segmentation import SegmentationConfig
from capsfl.learning.segmenters import make_segmenter
from capsfl.models.unet import UNetConfig

h5py = pytest.importorskip("h5py", reason="needs h5py; pip install 'capsfl[keras]'")

SIDE = 16


def write_patches(path: Path, count: int, *, seed: int) -> None:
    """Dim noise with a bright square; every fifth patch has none."""
    generator = np.random.default_rng(seed)
    images = generator.uniform(0.1, 0.4, (count, 1, SIDE, SIDE)).astype(np.float32)
    labels = np.zeros(images.shape)
    for number in range(count):
        if number % 5:
            row, column = generator.integers(3, 7, 2)
            part = (number, 0, slice(row, row + 6), slice(column, column + 6))
            images[part], labels[part] = 0.9, 1
    with h5py.File(path, "w") as file:
        file["images"], file["labels"] = images, labels


@pytest.fixture(scope="module")
def tumours(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tumours")
    write_patches(folder / "val_patches.h5", 20, seed=1)
    write_patches(folder / "test_patches.h5", 10, seed=2)
    return folder


def write_lungs(folder: Path, number: int, *, shape: tuple[int, int, int] = (32, 32, 32)) -> None:
    """A body of soft tissue with two lungs, in the order (i, j, k) of NIfTI; the mask rings as resampled ones do."""
    i, j, k = (np.arange(size) - (size - 1) / 2 for size in shape)
    body = (i[:, None, None] / 15) ** 2 + (j[None, :, None] / 13) ** 2 + 0 * k[None, None] < 1
    lungs = np.zeros(shape, bool)
    for middle in (-6, 6):
        lungs |= ((i[:, None, None] - middle) / 5) ** 2 + (j[None, :, None] / (7 + number)) ** 2 + (
            k[None, None] / 12
        ) ** 2 < 1
    hu = np.where(lungs, -850, np.where(body, 40, -1000)) + np.random.default_rng(number).normal(0, 10, shape)
    hu[0, 0] = -3024
    affine = np.diag([10.0, 10.0, 8.0, 1.0])
    mask = np.where(lungs, 250, 8).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(hu.astype(np.float32), affine), folder / f"id{number}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(mask, affine), folder / f"id{number}-msk.nii.gz")


@pytest.fixture(scope="module")
def lungs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lungs")
    for number in range(3):
        write_lungs(folder, number)
    return folder


def case(truth: np.ndarray, spacing_mm: tuple[float, float, float] = (2.0, 1.0, 1.0), name: str = "a") -> Patient:
    """A case of which only the truth matters; what is marked is bright."""
    hu = np.where(truth, 0.0, -1200.0).astype(np.float32)
    return Patient(name, "", "", None, hu, np.ones(truth.shape, bool), truth, spacing_mm)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The interval, which must be there."""
    found = crossed_interval(values)
    assert found is not None
    return found


@pytest.mark.parametrize("width", [0.25, 1.0])
def test_segcaps_has_a_twentieth_of_the_weights_of_unet_at_every_width(width):
    def weights(name) -> int:
        model = nnx.eval_shape(lambda: make_segmenter(network_config(name, width), rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    counts = {name: weights(name) for name in NETWORKS}
    assert counts["unet"] / counts["segcaps"] >= 20
    if width == 1:
        assert counts["segcaps"] == 1_425_649
        assert round(counts["unet"] / 1e6, 1) == 31.0
        assert round(counts["unet++"] / 1e6, 2) == 9.05


def test_every_patch_is_seen_once_before_any_is_seen_again():
    order = draw_order(10, SegmenterTrainingConfig(steps=7, batch_size=4), seed=3)
    assert order.shape == (7, 4)
    assert sorted(order.ravel()[:10]) == sorted(order.ravel()[10:20]) == list(range(10))
    assert not np.array_equal(order.ravel()[:10], order.ravel()[10:20])
    np.testing.assert_array_equal(order, draw_order(10, SegmenterTrainingConfig(steps=7, batch_size=4), seed=3))


def test_leaving_one_volume_out_keeps_its_patches_out(lungs):
    patients = read_lungs(lungs)
    assert [patient.name for patient in patients] == ["id0", "id1", "id2"]
    config = SegmentationConfig(crop=32, crops_per_plane=2)
    folds = leave_one_out(patients, config, seed=5)
    assert [fold.test for fold in folds] == [(patient,) for patient in patients]
    for left, fold in enumerate(folds):
        assert fold.pool["image"].shape == (12, 32, 32, 1)
        assert fold.test[0] not in fold.train
        # A patch that two folds share is the same in both; the volume left out gives none.
        seen = {patch.tobytes() for patch in fold.pool["image"]}
        for number in range(3):
            shared = seen & {patch.tobytes() for patch in folds[number].pool["image"]}
            assert len(shared) == (12 if number == left else 6), (left, number)


def test_lung_masks_ring_and_padding_is_no_body(lungs):
    patient = read_lungs(lungs)[0]
    assert patient.truth is not None
    np.testing.assert_array_equal(patient.truth, (patient.hu < -700) & patient.body)
    assert not patient.body[:, -1, -1].any()
    assert patient.spacing_mm == (8.0, 10.0, 10.0)


def test_lungs_are_marked_without_a_network(lungs):
    patients = read_lungs(lungs)
    fold = Fold("all", (), patients, {})
    assert min(score_masks(mark_lungs(fold), patients)["dice"]) > 0.9


def test_the_control_of_tumours_is_fitted_to_the_middle():
    rows, columns = np.indices((16, 16)) - 7.5
    disc = np.hypot(rows, columns)[None] <= 4.0
    cases = (case(disc), case(disc))
    fold = Fold("tumours", cases, cases, {})
    assert score_masks(mark_middle(fold), cases)["dice"] == [1.0, 1.0]
    # Bright at the rim as well: only the radius keeps it out.
    noisy = case(disc)
    noisy.hu[:, 0] = 0
    assert 4 <= fit_middle((noisy,))[0] < 7.5
    np.testing.assert_array_equal(mark_middle(Fold("t", (noisy,), (noisy,), {}))[0], disc)


def test_a_single_slice_is_scored_by_its_outline_and_a_volume_by_its_surface():
    truth = np.zeros((1, 20, 20), bool)
    truth[:, 5:15, 5:15] = True
    # Of a volume of one slice every voxel is surface, and the strip that is marked too much a small part of it.
    marked = truth.copy()
    marked[:, 5:15, 5:18] = True
    (distance,) = score_masks([marked], (case(truth),))["hd95_mm"]
    assert distance == 3.0
    found = score_masks([np.zeros_like(truth)], (case(truth),))
    assert found["dice"] == [0.0]
    assert found["hd95_mm"] == [pytest.approx(np.hypot(20, 20))]
    assert found["volume_error_ml"] == [pytest.approx(-0.2)]
    block = np.zeros((9, 9, 9), bool)
    block[2:6, 2:6, 2:6] = True
    moved = np.roll(block, 1, axis=0)
    assert score_masks([moved], (case(block, (2.0, 1.0, 1.0)),))["hd95_mm"] == [2.0]


def test_the_interval_of_one_seed_is_students_and_seeds_widen_it():
    values = np.array([[0.90, 0.92, 0.97]])
    low, high = interval(values)
    reach = 4.30265 * np.std(values[0], ddof=1) / np.sqrt(3)
    assert (low, high) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=1e-4)
    many = np.random.default_rng(0).normal(0.9, 0.01, (3, 400))
    shifted = many + np.array([[-0.1], [0.0], [0.1]])
    assert np.ptp(interval(many)) < 0.02
    assert np.ptp(interval(shifted)) > 0.3
    assert crossed_interval(np.array([[0.5]])) is None
    assert crossed_interval(np.full((2, 3), 0.5)) == (0.5, 0.5)


def test_the_interval_covers_a_mean_over_seeds_and_cases_about_as_often_as_it_says():
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(400):
        values = generator.normal(0, 1, (3, 1)) * 0.5 + generator.normal(0, 1, (1, 8)) + generator.normal(0, 1, (3, 8))
        low, high = interval(values)
        covered += low <= 0 <= high
    assert covered / 400 > 0.92


def test_networks_are_compared_case_by_case_and_the_goal_asks_for_both_halves():
    cases = np.array([0.2, 0.5, 0.9])
    runs = {
        "segcaps": [{"dice": list(cases + 0.005 * seed)} for seed in (0, 1)],
        "unet": [{"dice": list(cases + 0.004 + 0.005 * seed)} for seed in (0, 1)],
    }
    (row,) = compare(runs, {"segcaps": 10, "unet": 210}, ours="segcaps")
    assert row["network"] == "unet"
    assert row["parameter_ratio"] == 21
    # Cases differ by .7 and networks by .004 in every one of them: the paired interval sees only the latter.
    assert [row["difference"][key] for key in ("mean", "low", "high")] == pytest.approx([-0.004] * 3)
    goal = judge_goal([row])
    assert goal is not None
    assert (goal["met"], goal["shown"]) == (True, True)
    assert (judge_goal([row | {"parameter_ratio": 19.0}]) or {})["met"] is False
    assert (judge_goal([row | {"difference": {"mean": -0.02, "low": -0.03, "high": 0}}]) or {})["met"] is False
    wide = judge_goal([row | {"difference": {"mean": 0.0, "low": -0.1, "high": 0.1}}]) or {}
    assert (wide["met"], wide["shown"]) == (True, False)
    assert judge_goal([]) is None
    assert compare({"unet": runs["unet"]}, {"unet": 1}, ours="segcaps") == []


def test_a_summary_keeps_its_bounds_and_both_kinds_of_volume_error():
    found = summarize([{"dice": [1.0, 0.7], "hd95_mm": [0.0, 9.0], "volume_error_ml": [-2.0, 4.0]}])
    assert found["dice"]["high"] == 1.0
    assert found["hd95_mm"]["low"] == 0.0
    assert found["volume_error_ml"] == 1.0
    assert found["absolute_volume_error_ml"]["mean"] == 3.0


def test_slices_are_chosen_by_truth_alone_and_heads_are_up():
    truth = np.zeros((4, 8, 8), bool)
    truth[3, 2:6, 2:6] = True
    truth[2:4, 5, 5] = True
    first, second = segmenter_picture.fullest_slices(case(truth), {"unet": truth})
    assert first.title == "a, axial 3"
    np.testing.assert_array_equal(first.truth, truth[3])
    assert second.title == "a, coronal 5"
    assert second.truth[0].any(), "the highest slice is the top row"
    assert second.aspect == 2.0
    sizes = [0, 5, 1, 9, 3, 7]
    squares = [case(np.arange(64).reshape(1, 8, 8) < size) for size in sizes]
    chosen = segmenter_picture.choose_cases(squares, 3)
    assert len(chosen) == 3
    assert 0 not in chosen
    assert [sizes[place] for place in chosen] == sorted(sizes[place] for place in chosen)
    assert segmenter_picture.choose_cases(squares, 9) == [2, 4, 1, 5, 3]


@pytest.mark.journey
def test_tumours_through_the_command_line(tumours, tmp_path, capsys, monkeypatch):
    # A U-Net of one level compiles in a moment and learns what is bright.
    monkeypatch.setattr(segmenters, "network_config", lambda name, width: UNetConfig(width=8, depth=1, norm="none"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    out = tmp_path / "results"
    words = ["--data", str(tumours), "--task", "tumours", "--networks", "unet", "--steps", "40", "--seeds", "4"]
    tried = ["--learning-rates", "1e-6", "0.01", "--trial-steps", "20"]
    with pytest.raises(SystemExit) as end:
        main(["bench", "segmenters", *words, *tried, "--out", str(out), "--json"])
    captured = capsys.readouterr()
    assert not end.value.code, captured.err
    result = json.loads(captured.out)
    assert result == json.loads((out / "segmenters-tumours-cpu.json").read_text())
    (row,) = result["rows"]
    (losses,) = row["loss"]
    assert losses[-1] < 0.7 * losses[0]
    assert len(row["scores"]["dice"]) == len(result["cases"]) == 10
    assert result["summary"]["unet"]["dice"]["mean"] == pytest.approx(np.mean(row["scores"]["dice"]))
    assert result["summary"]["unet"]["dice"]["mean"] > 0.6
    assert result["networks"]["unet"]["temporary_bytes"] > 0
    assert (result["goal"], result["against"]) == (None, [])
    (choice,) = result["networks"]["unet"]["choice"].values()
    worse, better = choice["trials"]
    assert (worse["learning_rate"], better["learning_rate"], choice["learning_rate"]) == (1e-6, 0.01, 0.01)
    assert (worse["dice"], -worse["loss"]) < (better["dice"], -better["loss"])
    scores, costs, _ = page.tables(result)
    assert [words[0] for words in scores.rows] == ["unet", "mark middle"]
    assert costs.rows[0][:2] == ("unet", f"{result['networks']['unet']['parameters']:,}")
    for table in page.tables(result):
        assert {len(words) for words in table.rows} == {len(table.columns)}
    assert (out / "segmenters-tumours-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "![Slices of segmenters-tumours-cpu]" in page.write_page(out)


class TellsTruth:
    """Stands for a trained network that marks the truth, all but the lowest slice."""

    pools: ClassVar[list[set[bytes]]] = []
    trials: ClassVar[list[set[bytes]]] = []
    held: ClassVar[list[set[bytes]]] = []

    def __init__(self, config: SegmentationConfig, training: SegmenterTrainingConfig, pool: dict) -> None:
        self.facts = {"parameters": 210 if isinstance(config.model, UNetConfig) else 10, "temporary_bytes": 1 << 20}

    def train(self, fold: Fold, *, seed: int, learning_rate: float, steps: int | None = None) -> Trained:
        pools = self.pools if steps is None else self.trials
        pools.append({patch.tobytes() for patch in fold.pool["image"]})
        # The lowest volume likes 0.003 best, the others 0.01.
        wanted = 0.003 if fold.test[0].name == "id0" else 0.01
        return Trained(abs(learning_rate - wanted), np.linspace(1, 0, 20), 3.0)

    def held_back_dice(self, parameters: float, patches: dict) -> float:
        self.held.append({patch.tobytes() for patch in patches["image"]})
        return 1 - parameters

    def mark(self, parameters: object, fold: Fold) -> Marked:
        masks = [np.array(case.truth) for case in fold.test]
        for mask in masks:
            mask[:6] = False
        return Marked(masks, masks, 0.5)


def test_lungs_leave_out_each_volume_in_turn_and_all_networks_see_the_same_patches(lungs, monkeypatch, tmp_path):
    monkeypatch.setattr(segmenters, "SegmenterTrainer", TellsTruth)
    monkeypatch.setattr(segmenters, "LUNG_PATCHES", 4)
    said: list[str] = []
    options = SegmentersBench(lungs, networks=("segcaps", "unet"), seeds=(0, 1))
    result = segmenters.measure(options, say=said.append)
    assert result["cases"] == ["id0", "id1", "id2"]
    assert (result["patches"], result["crop"]) == (24, 32)
    # Two networks, two seeds, three folds: equal patches for both networks, others for every fold and seed.
    assert len(TellsTruth.pools) == 12
    assert TellsTruth.pools[:6] == TellsTruth.pools[6:]
    assert len({frozenset(pool) for pool in TellsTruth.pools}) == 6
    row = result["rows"][0]
    assert len(row["scores"]["dice"]) == len(row["axial_dice"]) == len(row["loss"]) == 3
    assert all(0.8 < value < 1 for value in row["scores"]["dice"])
    assert max(row["scores"]["volume_error_ml"]) < 0
    assert (row["train_cpu_s"], row["mark_cpu_s"]) == (3.0, 0.5)
    assert result["goal"] == {"margin": 0.01, "parameter_ratio": 20.0, "met": True, "shown": True}
    # Two networks, three folds, three step sizes: each tried without a volume, which it is scored on.
    assert len(TellsTruth.trials) == len(TellsTruth.held) == 18
    for number, (tried, held) in enumerate(zip(TellsTruth.trials, TellsTruth.held, strict=True)):
        assert not tried & held
        assert tried | held == TellsTruth.pools[number // 3 % 3]
    chosen = {fold: choice["learning_rate"] for fold, choice in result["networks"]["unet"]["choice"].items()}
    assert chosen == {"without id0": 0.003, "without id1": 0.01, "without id2": 0.01}
    assert result["networks"]["segcaps"]["config"]["norm"] == "length"
    first, costs, tried, second = page.tables(result)
    assert [words[2] for words in costs.rows] == ["0.003, 0.01", "0.003, 0.01"]
    assert costs.rows[0][4:] == ("20", "3", "0.5")
    assert tried.title.endswith("30 steps")
    assert tried.rows[0] == ("segcaps", "without id0", "0.998 at 0.001, 1.000 at 0.003, 0.993 at 0.01", "0.003")
    assert [words[0] for words in first.rows] == ["segcaps", "unet", "mark lungs"]
    assert second.title.endswith("met, by the whole interval")
    assert second.rows == [("unet", "21.0", "+0.000 (+0.000 to +0.000)")]
    assert [one.title.split(",")[0] for one in result["shown"]] == ["id0", "id0", "id1", "id1", "id2", "id2"]
    segmenter_picture.draw(result["shown"], tmp_path / "slices.png")
    quick = segmenters.measure(replace(options, quick=True), say=said.append)
    assert (quick["cases"], quick["seeds"], quick["training"]["steps"]) == (["id2"], [0], 40)
    assert "without id2" in said[-1]
    assert quick["networks"]["unet"]["choice"] == {"without id2": {"learning_rate": 0.003, "trials": []}}
    assert len(page.tables(quick)) == 3


class Diverges(TellsTruth):
    """Marks nothing at any step size; the loss of the largest is no number, that of 0.01 the lowest."""

    def train(self, fold: Fold, *, seed: int, learning_rate: float, steps: int | None = None) -> Trained:
        loss = {0.001: 1.2, 0.01: 0.9, 0.1: np.nan}[learning_rate]
        return Trained(None, np.full(10, loss), 1.0)

    def held_back_dice(self, parameters: object, patches: dict) -> float:
        return 0.0


def test_of_equal_step_sizes_the_lower_loss_is_chosen_and_no_number_never(tumours):
    fold = read_tumours(tumours)
    assert fold.held == 5
    trainer: Any = Diverges(SegmentationConfig(), SegmenterTrainingConfig(), {})
    rate, trials = search_rate(trainer, fold, (0.1, 0.001, 0.01), seed=0, steps=10, say=lambda _: None)
    assert rate == 0.01
    assert [trial.learning_rate for trial in trials] == [0.001, 0.01, 0.1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0.0}, "width = 0.0: expected 1/64 to 4"),
        ({"seeds": (1, 1)}, r"seeds = \[1, 1\]: give at least one, and none twice"),
        ({"networks": ()}, r"networks = \[\]: give at least one"),
        ({"steps": 0}, "steps = 0: must be above 0"),
        ({"trial_steps": 0}, "trial_steps = 0: must be above 0"),
        ({"learning_rates": (0.1, 0.0)}, r"learning_rates = \[0.1, 0.0\]: must all be above 0"),
        ({"learning_rates": (0.1, 0.1)}, r"learning_rates = \[0.1, 0.1\]: give at least one, and none twice"),
        ({}, "0 volumes with masks; leaving one out takes two or more"),
        ({"task": "tumours"}, r"val_patches.h5: no such file; give the folder of val_patches.h5 and test_patches.h5"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_training(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        segmenters.measure(SegmentersBench(tmp_path, **options), say=print)


def test_damaged_files_are_refused_by_name(tmp_path, tumours):
    (tmp_path / "val_patches.h5").write_bytes(b"no HDF5")
    with pytest.raises(SegmenterDataError, match=r"val_patches.h5: not a readable HDF5 file"):
        read_tumours(tmp_path)
    for images, labels, message in [
        (None, np.zeros((2, 1, 8, 8)), r"images of shape \(0,\); expected \(patches, 1, height, width\) numbers"),
        (np.zeros((2, 1, 8, 8)), np.zeros((3, 1, 8, 8)), r"images \(2, 8, 8\), labels \(3, 8, 8\)"),
        (np.zeros((2, 1, 9, 8)), np.zeros((2, 1, 9, 8)), "sides divisible by 8"),
        (np.full((2, 1, 8, 8), 40.0), np.zeros((2, 1, 8, 8)), r"expected images in \[0, 1\] and labels of 0 and 1"),
        (np.full((2, 1, 8, 8), np.nan), np.zeros((2, 1, 8, 8)), r"expected images in \[0, 1\]"),
    ]:
        with h5py.File(tmp_path / "val_patches.h5", "w") as file:
            if images is not None:
                file["images"] = images
            file["labels"] = labels
        with pytest.raises(SegmenterDataError, match=message):
            read_tumours(tmp_path)
    write_lungs(tmp_path, 0)
    write_lungs(tmp_path, 1, shape=(32, 40, 32))
    with pytest.raises(SegmenterDataError, match=r"id1.nii.gz: shape \(32, 40, 32\), id0 has \(32, 32, 32\)"):
        read_lungs(tmp_path)
    write_lungs(tmp_path, 1, shape=(32, 32, 30))
    with pytest.raises(SegmenterDataError, match=r"id1.nii.gz: shape \(30, 32, 32\); resample"):
        read_lungs(tmp_path)


def test_the_real_patches_and_lungs_are_what_the_reading_says(shared_data):
    if not (shared_data / "msd-lung-tumour-2mm").is_dir():
        pytest.skip("no msd-lung-tumour-2mm in the shared data")
    fold = read_tumours(shared_data / "msd-lung-tumour-2mm")
    assert (len(fold.train), len(fold.test)) == (130, 130)
    assert fold.pool["image"].shape == (130, 48, 48, 1)
    middles = [np.argwhere(p.truth)[:, 1:].mean(axis=0) for p in fold.test if p.truth is not None and p.truth.any()]
    np.testing.assert_allclose(np.mean(middles, axis=0), 23.5, atol=1.5)
    patients = read_lungs(shared_data / "lung-masks-3d")
    assert len(patients) == 3
    for patient in patients:
        assert patient.truth is not None
        assert not (patient.truth & ~patient.body).any(), "nothing outside the body is ever marked"
