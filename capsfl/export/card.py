"""The model card (Mitchell et al. 2019, arXiv:1810.03993): what a model is, whom it learnt from, what it is for.

It says what the run's own records say, and nothing un-noised about a hospital but its name and its number of records,
both of which its signed registration holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from capsfl.config import StudyConfig
from capsfl.ct.collections import CollectionConfig
from capsfl.ct.normalize import LUNG_WINDOW, SCANNER_WINDOWS

_USE = {
    "segmentation": "marks {target} on {planes} slices of standard CT volumes",
    "classification": "gives the class probabilities of images of a patient; {judged}",
}


@dataclass(frozen=True)
class CardModel:
    """A model on the card.

    Attributes:
        task: segmentation or classification.
        network: its configured name.
        parameters: number of weights.
        round: of the ledger's record that vouches for them.
        digest: the Merkle root of the weights in that record.
        inputs: what a program takes, in words.
        files: SHA-256 of each file, by its place beside the card.
        initial: name and SHA-256 of the file of weights that training began with; None where it began at random.
    """

    task: str
    network: str
    parameters: int
    round: int
    digest: str
    inputs: str
    files: Mapping[str, str] = field(default_factory=dict)
    initial: tuple[str, str] | None = None


def model_card(
    config: StudyConfig,
    results: Mapping[str, Any],
    ledger: Mapping[str, Any],
    models: Sequence[CardModel],
    *,
    holders: Mapping[str, int],
    version: str,
    kinds: Sequence[str] = ("volume",),
) -> str:
    """Returns the card as Markdown.

    Args:
        config: of the run.
        results: the run's results.json.
        ledger: the run's ledger.json.
        models: what is taken away.
        holders: records of each registered holder.
        version: of capsfl.
        kinds: what the study has seen of its patients, `volume` or `pictures` or both.
    """
    lines = [
        "# Model card",
        "",
        "**Not for clinical use.** Trained and scored for research; no authority has cleared it.",
        "",
        "## Intended use",
        "",
        *(
            f"- {m.task}: "
            + _USE[m.task].format(target=_target(config), planes=_planes(config), judged=_judged(config))
            + f" ({m.network})."
            for m in models
        ),
        "- Meant for: research on federated training; comparison with other models on the same data.",
        "- Not meant for: diagnosis, triage, or any decision about a patient; scanners and diseases it has not seen.",
        "",
        "## Models",
        "",
        "| task | network | weights | round | digest of the weights |",
        "|---|---|---|---|---|",
        *(f"| {m.task} | {m.network} | {m.parameters:,} | {m.round} | `{m.digest}` |" for m in models),
        "",
        *(f"- {m.task}: {m.inputs}" for m in models),
        *(f"- {m.task}: {_initial(m)}" for m in models),
        "",
        "## Data",
        "",
        f"- Source: {_source(config)}.",
        *_inputs(config, kinds),
        f"- Hospitals: {len(holders)}, with these patients in training:",
        "",
        *(f"  - {name}: {count}" for name, count in sorted(holders.items())),
        "",
        "## Privacy",
        "",
        *_privacy(results.get("privacy")),
        "",
        "## Scores on patients never trained on",
        "",
        *_scores(results),
        "",
        "## Provenance",
        "",
        f"- Ledger: {ledger['blocks']} blocks, head `{ledger['head']}`.",
        f"- Its chain `{ledger['chain_id']}`, its root `{ledger['root']}`.",
        f"- Configuration: SHA-256 `{config.digest()}`; capsfl {version}.",
        f"- Seed {config.seed}; patients split by seed {config.split_seed}.",
        "- `capsfl verify RUN` recomputes the digests above from the checkpoints.",
        "",
        "## Files",
        "",
        "| file | SHA-256 |",
        "|---|---|",
        *(f"| {name} | `{digest}` |" for m in models for name, digest in m.files.items()),
        "",
        "Weights are safetensors under the names of the ledger. A program needs jax and flatbuffers, and no capsfl:",
        "",
        "```python",
        "from pathlib import Path",
        "",
        "from jax import export",
        "",
        f'program = export.deserialize(bytearray(Path("{_program(models)}").read_bytes()))',
        "probabilities = program.call(images)  # float32, any number of them",
        "```",
        "",
    ]
    return "\n".join(lines)


def _program(models: Sequence[CardModel]) -> str:
    return next(name for model in models for name in model.files if name.endswith(".stablehlo"))


def _initial(model: CardModel) -> str:
    if model.initial is None:
        return "trained from random weights."
    name, digest = model.initial
    return (
        f"trained from the weights of the file {name}, SHA-256 `{digest}`; what that was trained on, its source says."
    )


def _target(config: StudyConfig) -> str:
    return "" if config.segmentation is None else config.segmentation.target


def _planes(config: StudyConfig) -> str:
    names = {"xy": "axial", "yz": "sagittal", "xz": "coronal"}
    planes = () if config.segmentation is None else config.segmentation.planes
    return ", ".join(names[plane] for plane in planes)


def _judged(config: StudyConfig) -> str:
    stage = config.classification
    if stage is None:
        return ""
    few = "image" if stage.top_slices == 1 else f"mean over the {stage.top_slices} images"
    return f"of at most {stage.slices_per_scan} a patient, the {few} least like class 0 judges the patient"


def _source(config: StudyConfig) -> str:
    if config.data.source:
        collection = config.data.collection
        named = "scans of the hospitals' manifest" if collection is None else f"the collection {collection.name}"
        return f"{named}, ingested by capsfl"
    return "the chest-CT phantom of capsfl: generated, no patient's scan is in it"


def _inputs(config: StudyConfig, kinds: Sequence[str]) -> list[str]:
    """What the models see of a patient, so that somebody else can show them the same."""
    lines = []
    if "volume" in kinds:
        volumes = config.data.volumes
        if volumes.window == "fixed":
            words = f"{_levels(*LUNG_WINDOW)} for all scanners"
        else:
            each = ", ".join(f"{name} {_levels(*levels)}" for name, levels in SCANNER_WINDOWS.items())
            words = f"of the scan's own scanner: {each}"
        field = "" if config.data.field is None else f", of it the central {' x '.join(map(str, config.data.field))}"
        lines.append(f"- Standard volumes: preset {volumes.preset} ({volumes.side} voxels a side{field}).")
        lines.append(f"- Window (level/width): {words}.")
    if "pictures" in kinds:
        made = config.data.collection or CollectionConfig(name="manifest")
        lines.append(
            f"- Pictures, whose grey values are not Hounsfield units: {made.side} pixels a side, fit {made.fit}, "
            f"levels {made.levels}."
        )
    return lines


def _levels(level: float, width: float) -> str:
    return f"{level:g}/{width:g} HU"


def _privacy(statement: Mapping[str, Any] | None) -> list[str]:
    if statement is None:
        return ["- No noise was added: no epsilon bounds what these weights tell about a patient or a hospital."]
    epsilon = "none" if statement["epsilon"] is None else f"{statement['epsilon']:.4g}"
    rows = [
        f"- epsilon {epsilon} at delta {statement['delta']:g}, of all models of the run together.",
        f"- Unit {statement['unit']}, relation {statement['relation']}, accountant {statement['accountant']}.",
        f"- Clip norm {statement['clip_norm']:g}, noise multiplier {statement['noise_multiplier']:g}.",
        f"- Sampler {statement['sampler']}, {statement['rounds']} rounds.",
    ]
    return [*rows, f"- Remark: {statement['remark']}."] if statement.get("remark") else rows


def _scores(results: Mapping[str, Any]) -> list[str]:
    lines = ["| task | score | value | 95 % interval |", "|---|---|---|---|"]
    for task in ("segmentation", "classification"):
        overall = results.get(task, {}).get("overall", {})
        for name in (
            "dice",
            "outside_field",
            "auc",
            "balanced_accuracy",
            "sensitivity",
            "specificity",
            "brier",
            "patients",
        ):
            if (value := overall.get(name)) is not None:
                low, high = overall.get(f"{name}_low"), overall.get(f"{name}_high")
                interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
                lines.append(f"| {task} | {name} | {value:.4g} | {interval} |")
    return lines
