"""What a run keeps of its capsules, from patients whose slices are known, and that the page shows it."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsfl.config import ClassificationStage, ReportConfig, SegmentationStage, StudyConfig
from capsfl.ct.normalize import window
from capsfl.ct.phantom import PhantomConfig
from capsfl.evaluation import Segmented, Trained, interpretation, write_interpretation
from capsfl.learning.patients import Patient
from capsfl.learning.tasks import make_task
from capsfl.models.capsnet import CapsNet, CapsNetConfig
from capsfl.models.interpretation import CouplingMaps, RoutedLayer
from capsfl.models.segcaps import SegCapsConfig
from capsfl.models.unet import UNetConfig
from capsfl.models.zoo.vgg import VGGConfig
from capsfl.report import StudyError, build_page
from capsfl.study import Split

DECODING = CapsNetConfig(
    image_size=12, conv_channels=4, conv_kernel=3, primary_capsules=2, primary_kernel=3, decoder=(8,)
)
SILENT = CapsNetConfig.ct(image_size=32)
ROUTING = SegCapsConfig(width=0.13)


class Marks:
    """A segmenter that marks whatever is denser than water."""

    def planes(self, parameters: Any, hu: np.ndarray, body: np.ndarray, window_hu: Any) -> dict[str, np.ndarray]:
        return {"yz": (hu > 0).astype(np.float32)}

    def fused(self, planes: dict[str, np.ndarray]) -> np.ndarray:
        return planes["yz"]


def patient(name: str, hospital: str, label: int, *, lesion: int | None) -> Patient:
    """A scan of 8 x 16 x 24 voxels, dense where `lesion` is its x."""
    hu = np.random.default_rng(len(name) + label).normal(-800, 20, (8, 16, 24)).astype(np.float32)
    truth = np.zeros(hu.shape, bool)
    if lesion is not None:
        truth[2:6, 4:12, lesion] = truth[3, 5, lesion + 1] = True
    hu[truth] = 50
    levels = (-500.0, 1500.0) if hospital == "B" else (-600.0, 1600.0)
    return Patient(name, hospital, "", label, hu, np.ones(hu.shape, bool), truth, (4.0, 2.0, 2.0), window_hu=levels)


TEST = (
    patient("a", "A", 0, lesion=None),
    patient("b", "A", 0, lesion=None),
    patient("c", "A", 1, lesion=5),
    patient("d", "B", 1, lesion=9),
    patient("e", "B", 1, lesion=12),
)


def study(model: Any = DECODING, segmenter: Any = ROUTING) -> StudyConfig:
    return StudyConfig(
        phantom=PhantomConfig(),
        segmentation=SegmentationStage(planes=("yz",), model=segmenter),
        classification=ClassificationStage(model=model, image_size=getattr(model, "image_size", 64), slices_per_scan=3),
    )


def trained(network: nnx.Module) -> Trained:
    generator = np.random.default_rng(0)
    graph, state = nnx.split(network)

    def draw(leaf: Any) -> jax.Array:
        return jnp.asarray(0.3 * generator.standard_normal(leaf.shape), jnp.float32)

    task = make_task("x", nnx.merge(graph, jax.tree.map(draw, state)), lambda model, batch: jnp.zeros(()))
    return Trained(task, task.parameters, {})


def capsnet(config: CapsNetConfig) -> Trained:
    return trained(nnx.eval_shape(lambda: CapsNet(config, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[np.ndarray]]:
    """A run's folder, what its results list, and the slices that were routed."""
    folder, seen = tmp_path_factory.mktemp("run"), []

    def routed(network: Any, images: jax.Array) -> CouplingMaps:
        seen.append(np.asarray(images))
        share = jnp.linspace(0, 1, 8 * 16).reshape(1, 1, 8, 16).repeat(3, axis=1)
        first = RoutedLayer("conv_cap_2_2", (2,), jnp.full((1, 2, 4, 4, 8), 0.25), jnp.full((1, 4, 4, 8), 0.5))
        last = RoutedLayer("deconv_cap_3_1", (2, 1), jnp.stack([share, 1 - share], axis=2), jnp.ones((1, 2, 8, 16)))
        return CouplingMaps((first, last), jnp.ones((1, 8, 16)))

    results: dict[str, Any] = {}
    networks = {"classification": capsnet(DECODING), "segmentation": trained(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpretation, "coupling_maps", routed)
        scans = Segmented(Marks(), None)  # type: ignore[arg-type]
        write_interpretation(folder, Split((), (), TEST), networks, scans, study(), results)
    return folder, results["interpretation"], seen


def test_a_patient_of_every_class_is_shown_and_disease_comes_first(kept):
    folder, table, _ = kept
    rows = table["capsules"]["patients"]
    assert [(row["patient"], row["hospital"], row["label"]) for row in rows] == [("d", "B", 1), ("a", "A", 0)]
    with np.load(folder / "interpretation.npz") as arrays:
        for row in rows:
            moved = arrays[f"moved_{row['key']}"]
            assert (moved.shape, moved.dtype) == ((16, 11, 12, 12), np.uint8)
            assert (moved[:, 5] == moved[0, 5]).all()
            assert np.ptp(moved.astype(int), axis=1).max() > 0
            length = np.linalg.norm(arrays[f"capsule_{row['key']}"])
            assert length == pytest.approx(max(row["lengths"]), rel=1e-5)
            assert row["class"] == int(np.argmax(row["lengths"]))


def test_the_slice_with_most_truth_of_two_hospitals_is_routed(kept):
    folder, table, seen = kept
    rows = table["couplings"]["patients"]
    assert table["couplings"]["iterations"] == 3
    assert [(row["patient"], row["plane"], row["index"]) for row in rows] == [("c", "yz", 5), ("d", "yz", 9)]
    with np.load(folder / "interpretation.npz") as arrays:
        for row, image, shown in zip(rows, seen, (TEST[2], TEST[3]), strict=True):
            np.testing.assert_array_equal(image[0, ..., 0], window(shown.hu[:, :, row["index"]], *shown.window_hu))
            np.testing.assert_array_equal(arrays[f"truth_{row['key']}"], shown.truth[:, :, row["index"]])  # type: ignore[index]
            assert arrays[f"prediction_{row['key']}"].sum() == 32
            assert arrays[f"aspect_{row['key']}"] == 2
            for layer in row["layers"]:
                couplings = arrays[f"couplings_{row['key']}_{layer['name']}"].astype(float)
                assert len(couplings) == sum(layer["sources"])
                np.testing.assert_allclose(couplings.sum(axis=1), 1, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "segmenter", "absent", "words"),
    [
        (SILENT, SegCapsConfig(num_iters=1), ("decoder", "routing"), ("trained without a decoder", "routes once")),
        (VGGConfig(), UNetConfig(), ("capsules", "capsules"), ("vgg16 has no capsules", "unet has no capsules")),
    ],
    ids=["nothing to show", "no capsules"],
)  # fmt: skip
def test_a_network_with_nothing_to_show_says_why(tmp_path, write_study, model, segmenter, absent, words):
    results: dict[str, Any] = {}
    other = trained(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    networks = {"classification": capsnet(SILENT) if model is SILENT else other, "segmentation": other}
    scans = Segmented(Marks(), None)  # type: ignore[arg-type]
    write_interpretation(tmp_path, Split((), (), TEST), networks, scans, study(model, segmenter), results)
    table = results["interpretation"]
    assert (table["capsules"]["absent"], table["couplings"]["absent"]) == absent
    assert not list(tmp_path.iterdir())
    page = build_page(put(write_study(tmp_path / "study", arms=("federated",)), table)).read_text()
    assert all(each in page for each in words)
    assert 'class="capsules"' not in page


def test_nothing_is_done_where_it_is_switched_off(tmp_path):
    config = study(SILENT).model_copy(update={"report": ReportConfig(interpretation=False)})
    results: dict[str, Any] = {}
    write_interpretation(tmp_path, Split((), (), TEST), {"classification": capsnet(SILENT)}, None, config, results)
    assert not results


def put(folder: Path, table: dict[str, Any], arrays: Path | None = None) -> Path:
    """Adds the section to a study's results."""
    path = folder / "federated" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"interpretation": table}))
    if arrays is not None:
        (path.parent / arrays.name).write_bytes(arrays.read_bytes())
    return folder


def test_the_page_draws_what_was_kept_and_names_damage(tmp_path, write_study, kept):
    run, table, _ = kept
    folder = put(write_study(tmp_path / "study", arms=("federated",)), table, run / "interpretation.npz")
    page = build_page(folder).read_text()
    section = page[page.index('<section id="interpretation">') :]
    section = section[: section.index("</section>")]
    assert section.count("<svg") == 4
    assert "d, hospital B · truth: class 1 · capsule of class" in section
    assert "d, hospital B · plane yz, slice 9" in section
    assert "mean 0.000" in section  # equal shares decide nothing
    assert section.count("Not to be concluded") == 2
    with np.load(run / "interpretation.npz") as arrays:
        broken: dict[str, Any] = dict(arrays) | {"lengths_slice0_deconv_cap_3_1": np.ones((2, 3, 3))}
    np.savez(folder / "federated" / "interpretation.npz", **broken)
    with pytest.raises(
        StudyError, match=r"couplings and lengths of deconv_cap_3_1 are \(3, 2, 8, 16\) and \(2, 3, 3\)"
    ):
        build_page(folder)
