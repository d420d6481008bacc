"""The trained networks of a study: weights that its ledger vouches for, and what they say about a scan."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from capsfl.audit import choose_run
from capsfl.checkpoint import latest_parameters, tensor_leaves
from capsfl.config import StudyConfig
from capsfl.ct.dicom_seg import Algorithm
from capsfl.ct.index import read_collection_record
from capsfl.ct.ingest_scan import IngestConfig
from capsfl.ct.lungs import body_mask, find_lungs
from capsfl.ct.normalize import StandardVolume, scanner_window, standardize, to_scan_space
from capsfl.ct.pictures import PictureSet
from capsfl.ct.scan import Scan
from capsfl.federated.batch_norm import check_portable
from capsfl.learning.classification import Classifier, images_of, make_classification_task, seen_pictures
from capsfl.learning.fusion import load_fusion
from capsfl.learning.patients import Patient, central_field
from capsfl.learning.segmentation import Segmenter, make_segmentation_task
from capsfl.learning.tasks import Task
from capsfl.ledger.chain import Ledger
from capsfl.ledger.records import RoundRecord, parameters_root
from capsfl.study import load_study_config, study_kinds


@dataclass(frozen=True)
class Answer:
    """What a study says about a scan.

    Attributes:
        mask: `(z, y, x)` bool on the scan's grid; None where nothing segments.
        probability: `(z, y, x)` float32 on the scan's grid; None where nothing segments.
        images: `(images, classes)` class probabilities of the images that the classifier saw; None without one.
        outside_field: share of the lungs that lies outside the field that the networks saw; None without lungs.
        field: low and high corner `(2, 3)` of that field, in the scan's voxels along (z, y, x); None if not known.
    """

    mask: np.ndarray | None
    probability: np.ndarray | None
    images: np.ndarray | None
    outside_field: float | None = None
    field: np.ndarray | None = None


class Model:
    """A run of a study: weights that its ledger vouches for, read once, and programs compiled once for all scans.

    Args:
        study: folder that `capsfl train` wrote.
        scanner: which scanner of Table II made the scans, for a study whose scanners have a window each; when None
            the scan's own tags say.
        arm_name: whose models, as `choose_run` takes it; by default the study's own arm, its first.

    Raises:
        ValueError: no study, or no such arm.
    """

    def __init__(self, study: Path, *, scanner: str | None = None, arm_name: str | None = None) -> None:
        config = load_study_config(study)
        self._scanner = scanner
        arm, place = choose_run(study, config, arm_name)
        self.run, self.config = study / place, config.arm(arm)
        self.classes = _class_names(study, self.config)
        with Ledger.open(self.run / "ledger") as ledger:
            self._recorded, head = ledger.rounds(), ledger.blocks()[-1].hash().hex()
        self.facts: dict[str, Any] = {
            "arm": place,
            "models": {},
            "ledger_head": head,
            "configuration_hash": config.digest(),
            "capsfl": version("capsfl"),
        }
        self.segmenter = self.classifier = None
        if (marking := self.config.segmentation) is not None:
            task = make_segmentation_task(marking, seed=config.seed, pretrained=False)
            fusion = load_fusion(self.run, marking.planes) if marking.fusion == "learned" else None
            self.segmenter = Segmenter(task, marking, fusion_weights=fusion)
            self._marking_weights = self._weights(task)
        if (stage := self.config.classification) is not None:
            task = make_classification_task(stage, seed=config.seed + 1, pretrained=False)
            self.classifier = Classifier(task, stage)
            self._judging_weights = self._weights(task)
        # Pictures have no mask, so that a study that marks and does not classify says nothing of them.
        self.kinds = tuple(kind for kind in study_kinds(study) if kind == "volume" or self.classifier is not None)

    def _weights(self, task: Task) -> Any:
        stage = self.config.stages[task.name]
        check_portable(task, stage.batch_norm, self.config.privacy, stage.aggregation)
        weights = latest_parameters(self.run / "checkpoints" / task.name, task.parameters, self._recorded)
        digest = parameters_root(tensor_leaves(weights))
        record = _latest(self._recorded, task.name, digest)
        network = stage.model.name
        self.facts["models"][task.name] = {"network": network, "round": record.round, "digest": digest}
        return weights

    @property
    def target(self) -> str:
        """What is marked, in words; empty where nothing is."""
        return "" if self.config.segmentation is None else self.config.segmentation.target

    @property
    def square(self) -> dict[str, Any]:
        """How the study's importer made a square of a picture: side, fit and levels."""
        data = self.config.data
        return IngestConfig(data.volumes, data.collection if data.source else None).square

    @property
    def cuts_boxes(self) -> bool:
        """Whether the study's pictures were cut to boxes of their collection's, which new pictures do not have."""
        collection = self.config.data.collection
        return collection is not None and collection.name == "covidx-ct"

    @property
    def algorithm(self) -> Algorithm:
        """Who marks, for the files that carry a mask."""
        model = self.facts["models"]["segmentation"]
        named = {"arm": self.facts["arm"], "round": str(model["round"]), "model": model["digest"]}
        named |= {"ledger_head": self.facts["ledger_head"], "configuration": self.facts["configuration_hash"]}
        return Algorithm(f"capsfl {model['network']}", self.facts["capsfl"], model["digest"][:64], named)

    def answer(self, scan: Scan) -> Answer:
        """Segments and classifies one scan.

        Raises:
            ScanError: in the study each scanner has its window, and the scan's has none.
        """
        source = scan.source
        scanner = self._scanner or f"{source.manufacturer} {source.model}".strip()
        levels = scanner_window(self.config.data.volumes, scanner)
        volume = standardize(scan, config=self.config.data.volumes)
        field = central_field(volume.hu.shape, self.config.data.field)
        corners = _corners(field, volume, scan)
        hu = np.asarray(volume.hu[field], np.float32)
        fused = mask = probability = images = None
        if self.segmenter is not None:
            body = body_mask(volume.hu, volume.spacing_mm)[field]
            fused = self.segmenter.fused(self.segmenter.planes(self._marking_weights, hu, body, levels))
            whole = np.zeros(volume.hu.shape, np.float32)
            whole[field] = fused
            probability = to_scan_space(whole, volume.affine, scan.affine, scan.hu.shape)
            mask = (probability > np.float32(self.segmenter.config.decision)) & scan.valid
        if self.classifier is not None:
            patient = Patient("", "", "", None, hu, np.empty(0, bool), None, volume.spacing_mm, window_hu=levels)
            seen = images_of(patient, self.classifier.config, probability=fused)
            images = self.classifier.probabilities(self._judging_weights, seen)
        return Answer(mask, probability, images, _lungs_outside(field, volume), corners)

    def look(self, pictures: PictureSet) -> tuple[np.ndarray, np.ndarray]:
        """Returns what the network saw of every picture of a patient, and what it says of it.

        Args:
            pictures: squares as the study's importer makes them, see `square`.

        Returns:
            `(n, side, side, 1)` float32 in [0, 1], and `(n, classes)` class probabilities.
        """
        assert self.classifier is not None
        nothing = np.empty((0, 0, 0), np.float32)
        patient = Patient("", "", "", None, nothing, nothing > 0, None, (1.0, 1.0, 1.0), pictures=pictures)
        every = self.classifier.config.model_copy(update={"slices_per_scan": len(pictures.pixels)})
        seen = images_of(patient, every)
        return seen, self.classifier.probabilities(self._judging_weights, seen)

    def counted(self, count: int) -> np.ndarray:
        """Which of a patient's `count` pictures its probability is made of, by the study's own rule."""
        assert self.classifier is not None
        return seen_pictures(count, self.classifier.config)

    def judge(self, images: np.ndarray) -> list[float]:
        """Class probabilities of a patient from those of its images `(images, classes)`, see `Classifier.judge`."""
        assert self.classifier is not None
        return [float(value) for value in self.classifier.judge(images)]


def _latest(recorded: Sequence[RoundRecord], task: str, digest: str) -> RoundRecord:
    return max((r for r in recorded if r.task == task and r.parameters_digest == digest), key=lambda r: r.round)


def _class_names(study: Path, config: StudyConfig) -> tuple[str, ...]:
    """What the classes are called: by the collection that the study was trained on, else by their numbers."""
    if config.classification is None:
        return ()
    count = config.classification.num_classes
    record = read_collection_record(study / "volumes")
    if record is not None and len(record["classes"]) == count:
        return record["classes"]
    return tuple(f"class {number}" for number in range(count))


def _corners(field: tuple[slice, slice, slice], volume: StandardVolume, scan: Scan) -> np.ndarray:
    """Low and high corner `(2, 3)` of a field of the standard volume in the scan's voxels."""
    to_scan = np.linalg.inv(scan.affine) @ volume.affine
    edges = np.array([[part.start - 0.5 for part in field], [part.stop - 0.5 for part in field]])
    return edges @ to_scan[:3, :3].T + to_scan[:3, 3]


def _lungs_outside(field: tuple[slice, slice, slice], volume: StandardVolume) -> float | None:
    """Share of the lungs that the standard volume or the field within it cut off; None where no lung is found."""
    cut = volume.cropped_lung_fraction
    lungs = find_lungs(volume.hu, volume.spacing_mm)
    if lungs is None:
        return cut or None
    low, high = (np.array([getattr(part, end) for part in field]) for end in ("start", "stop"))
    return cut + (1 - cut) * lungs.fraction_outside(low, high)
