"""What a run's capsules show of a few test patients: moved class capsules, and the couplings of SegCaps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from capsfl.config import StudyConfig
from capsfl.ct.normalize import window
from capsfl.evaluation.arrays import write_arrays
from capsfl.evaluation.classification import Images
from capsfl.evaluation.segmentation import Segmented, one_per_hospital
from capsfl.learning.patients import Patient
from capsfl.learning.segmentation import SegmentationConfig
from capsfl.learning.tasks import Task
from capsfl.models.capsnet import CapsNet
from capsfl.models.efficient_capsnet import EfficientCapsNet
from capsfl.models.interpretation import CapsuleGrid, capsule_grid, coupling_maps
from capsfl.models.planes import plane_axes, slice_at
from capsfl.models.segcaps import SegCapsConfig
from capsfl.study import Split

FILE = "interpretation.npz"
"""File of the arrays in a run's folder."""
GRIDS = 2
"""Test patients whose class capsule is moved: of different classes where there are such."""
MAPS = 2
"""Test patients of whom a slice shows the couplings: of different hospitals where there are such."""

Arrays = dict[str, np.ndarray]


class Trained(NamedTuple):
    """A network at the end of a run.

    Attributes:
        task: what it was trained for.
        weights: the server's.
        own: by hospital, the weights that are used there instead; see `rounds.batch_norm`.
    """

    task: Task
    weights: Any
    own: Mapping[str, Any]

    def network(self, patient: Patient) -> Any:
        """The network that looks at a patient."""
        return self.task.merge(self.own.get(patient.hospital, self.weights))


def write_interpretation(
    folder: Path,
    split: Split,
    trained: Mapping[str, Trained],
    scans: Segmented | None,
    config: StudyConfig,
    results: dict[str, Any],
) -> None:
    """Writes the arrays that the page's section on capsules is drawn from, and lists them under `interpretation`.

    Where a network has nothing to show (no capsules, no decoder, one iteration of routing) the list says why. Nothing
    is done where `report.interpretation` is off.

    Args:
        folder: the run's.
        split: the patients.
        trained: by task, the networks.
        scans: the masks, where the run segments.
        config: of the run.
        results: of the run; one key is added.
    """
    if not config.report.interpretation:
        return
    arrays: Arrays = {}
    table: dict[str, Any] = {}
    if (looker := trained.get("classification")) is not None:
        assert config.classification is not None
        images = Images(config.classification, scans)
        network, name = looker.network(split.test[0]), config.classification.model.name
        table["capsules"] = {"network": name} | (
            _grids(looker, images, split.test, arrays)
            if isinstance(network, CapsNet | EfficientCapsNet) and network.decoder is not None
            else {"absent": "decoder" if isinstance(network, CapsNet | EfficientCapsNet) else "capsules"}
        )
    if (marker := trained.get("segmentation")) is not None:
        assert config.segmentation is not None
        assert scans is not None
        model = config.segmentation.model
        table["couplings"] = {"network": model.name} | (
            {"iterations": model.num_iters} | _maps(marker, scans, split.test, config.segmentation, arrays)
            if isinstance(model, SegCapsConfig) and model.num_iters > 1
            else {"absent": "routing" if isinstance(model, SegCapsConfig) else "capsules"}
        )
    results["interpretation"] = table
    if arrays:
        write_arrays(folder / FILE, arrays)


def _grids(looker: Trained, images: Images, patients: Sequence[Patient], arrays: Arrays) -> dict[str, Any]:
    """Moves the longest class capsule of the image of a patient that looks least like class 0."""
    rows = []
    for patient in _one_per_class([p for p in patients if p.label is not None])[:GRIDS]:
        network = looker.network(patient)
        pictures = jnp.repeat(jnp.asarray(images.of(patient)), network.image_shape[-1], axis=-1)
        # One image at a time, so that one program serves any number of them.
        grids = [capsule_grid(network, picture[None]) for picture in pictures]
        place = int(np.argmin([_share_of_class_0(grid) for grid in grids]))
        grid, key = grids[place], f"grid{len(rows)}"
        arrays[f"image_{key}"] = _levels(pictures[place])
        arrays[f"moved_{key}"] = _levels(grid.reconstructions[0])
        arrays[f"capsule_{key}"] = np.asarray(grid.capsule[0])
        arrays["tweaks"] = np.asarray(grid.tweaks)
        rows.append(
            {
                "key": key,
                "patient": patient.name,
                "hospital": patient.hospital,
                "label": patient.label,
                "image": place,
                "images": len(pictures),
                "class": int(grid.chosen[0]),
                "lengths": [float(length) for length in grid.lengths[0]],
            }
        )
    return {"patients": rows}


def _share_of_class_0(grid: CapsuleGrid) -> float:
    return float(grid.lengths[0, 0] / jnp.maximum(jnp.sum(grid.lengths[0]), 1e-9))


def _levels(images: Any) -> np.ndarray:
    """Intensities `(..., channels)` in [0, 1] as 8-bit grey `(...)`, the mean over channels."""
    return np.round(np.clip(np.asarray(images).mean(axis=-1), 0, 1) * 255).astype(np.uint8)


def _maps(
    marker: Trained, scans: Segmented, patients: Sequence[Patient], config: SegmentationConfig, arrays: Arrays
) -> dict[str, Any]:
    """Routes the slice of a patient with most truth, in the first plane that the network was trained on."""
    plane = config.planes[0]
    axis, *sides = plane_axes(plane)
    rows = []
    for patient in one_per_hospital([p for p in patients if p.truth is not None and p.truth.any()])[:MAPS]:
        assert patient.truth is not None
        index, key = int(np.argmax(patient.truth.sum(axis=tuple(sides)))), f"slice{len(rows)}"
        image = slice_at(np.asarray(window(patient.hu, *patient.window_hu)), plane, index, config.model.in_channels)
        maps = coupling_maps(marker.network(patient), jnp.asarray(image)[None])
        slices = {"hu": patient.hu, "body": patient.body, "truth": patient.truth, "prediction": scans.fused(patient)}
        arrays |= {f"{name}_{key}": np.take(volume, index, axis=axis) for name, volume in slices.items()}
        arrays[f"aspect_{key}"] = np.asarray(patient.spacing_mm[sides[0]] / patient.spacing_mm[sides[1]])
        for layer in maps.layers:
            arrays[f"couplings_{key}_{layer.name}"] = np.asarray(layer.couplings[0], np.float16)
            arrays[f"lengths_{key}_{layer.name}"] = np.asarray(layer.lengths[0], np.float16)
        rows.append(
            {
                "key": key,
                "patient": patient.name,
                "hospital": patient.hospital,
                "plane": plane,
                "index": index,
                "layers": [{"name": layer.name, "sources": list(layer.sources)} for layer in maps.layers],
            }
        )
    return {"patients": rows}


def _one_per_class(patients: Sequence[Patient]) -> list[Patient]:
    """Orders patients so that the first ones are of different classes, disease before health, and other hospitals."""
    ranked = one_per_hospital(patients)
    chosen: dict[str, Patient] = {}
    for label in sorted({p.label or 0 for p in ranked}, key=lambda label: (label == 0, label)):
        of_class = [p for p in ranked if p.label == label]
        seen = {p.hospital for p in chosen.values()}
        first = next((p for p in of_class if p.hospital not in seen), of_class[0])
        chosen[first.key] = first
    return [*chosen.values(), *(p for p in ranked if p.key not in chosen)]
