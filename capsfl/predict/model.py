"""The trained networks of a study: weights that its ledger vouches for, and what they say about a scan."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from capsfl.audit import run_places
from capsfl.checkpoint import latest_parameters, tensor_leaves
from capsfl.ct.dicom_seg import Algorithm
from capsfl.ct.lungs import body_mask
from capsfl.ct.normalize import scanner_window, standardize, to_scan_space
from capsfl.ct.scan import Scan
from capsfl.federated.batch_norm import check_portable
from capsfl.learning.classification import Classifier, images_of, make_classification_task
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
    """

    mask: np.ndarray | None
    probability: np.ndarray | None
    images: np.ndarray | None


class Model:
    """A study's own arm: weights that its ledger vouches for, read once, and programs compiled once for all scans.

    Args:
        study: folder that `capsfl train` wrote.
        scanner: which scanner of Table II made the scans, for a study whose scanners have a window each; when None
            the scan's own tags say.

    Raises:
        ValueError: no study, or one that has seen pictures and no volume: it knows nothing of Hounsfield units.
    """

    def __init__(self, study: Path, *, scanner: str | None = None) -> None:
        config = load_study_config(study)
        if study_kinds(study) == ("pictures",):
            raise ValueError(
                f"{study}: trained on pictures, whose grey values are not Hounsfield units, so it cannot judge CT "
                "scans; name a study that was trained on volumes"
            )
        self._scanner = scanner
        arm, place = run_places(study, config)[0]
        self.run, self.config = study / place, config.arm(arm)
        with Ledger.open(self.run / "ledger") as ledger:
            self._recorded, head = ledger.rounds(), ledger.blocks()[-1].hash().hex()
        self.facts: dict[str, Any] = {
            "arm": arm.name,
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
        return Answer(mask, probability, images)

    def judge(self, images: np.ndarray) -> list[float]:
        """Class probabilities of a patient from those of its images `(images, classes)`, see `Classifier.judge`."""
        assert self.classifier is not None
        return [float(value) for value in self.classifier.judge(images)]


def _latest(recorded: Sequence[RoundRecord], task: str, digest: str) -> RoundRecord:
    return max((r for r in recorded if r.task == task and r.parameters_digest == digest), key=lambda r: r.round)
