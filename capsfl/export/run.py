"""`capsfl export`: the models of a study's own arm, in a folder that stands on its own."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from capsfl.audit import choose_run
from capsfl.checkpoint import latest_parameters, named_arrays, tensor_leaves
from capsfl.config import StudyConfig
from capsfl.export.card import CardModel, model_card
from capsfl.export.program import ExportError, classification_function, export_program, segmentation_function
from capsfl.federated.batch_norm import check_portable
from capsfl.learning.classification import make_classification_task
from capsfl.learning.segmentation import make_segmentation_task
from capsfl.learning.tasks import Task
from capsfl.ledger.chain import Ledger
from capsfl.ledger.records import RoundRecord, parameters_root
from capsfl.ledger.statements import Registration
from capsfl.models.planes import plane_axes
from capsfl.study import load_study_config, study_kinds, study_weights


def export_models(study: Path, out: Path, *, arm_name: str | None = None) -> Path:
    """Writes the weights, the programs and the card of a finished arm of a study.

    Everything is written beside `out` and renamed to it, so that it is whole or not there.

    Args:
        study: folder that `capsfl train` wrote.
        out: a folder that does not exist yet, or is empty.
        arm_name: whose models, as `choose_run` takes it; by default the study's own arm, its first.

    Returns:
        `out`, which then holds `MODEL_CARD.md` and for each task `weights.safetensors`, `network.json` and programs.

    Raises:
        ValueError: no finished study, weights that its ledger does not vouch for, a model that cannot be taken away,
            or a folder that is not empty.
    """
    if missing := [name for name in ("safetensors", "flatbuffers") if find_spec(name) is None]:
        raise ExportError(f"capsfl export: needs {' and '.join(missing)}; pip install 'capsfl[export]'")
    config = load_study_config(study)
    arm, place = choose_run(study, config, arm_name)
    run, config = study / place, config.arm(arm)
    if not (run / "results.json").exists():
        raise ExportError(f"{run}: no results.json; let `capsfl train` finish first")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out}: not empty; name a new folder")
    with Ledger.open(run / "ledger") as ledger:
        recorded = ledger.rounds()
        records = [record for block in ledger.blocks() for record in block.records]
    holders = {r.name: r.records for r in records if isinstance(r, Registration)}
    draft = out.with_name(f".{out.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        kinds, began = study_kinds(study), study_weights(study)
        models = [_export_task(config, run, task, recorded, draft, kinds, began) for task in config.stages]
        results, summary = (json.loads((run / f"{name}.json").read_text("utf-8")) for name in ("results", "ledger"))
        card = model_card(config, results, summary, models, holders=holders, version=version("capsfl"), kinds=kinds)
        (draft / "MODEL_CARD.md").write_text(card, encoding="utf-8")
        if out.exists():
            out.rmdir()
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return out


def _export_task(
    config: StudyConfig,
    run: Path,
    name: str,
    recorded: tuple[RoundRecord, ...],
    draft: Path,
    kinds: tuple[str, ...],
    began: Mapping[str, str],
) -> CardModel:
    stage = config.stages[name]
    task, programs, inputs = _programs(config, name, kinds)
    check_portable(task, stage.batch_norm, config.privacy, stage.aggregation)
    weights = latest_parameters(run / "checkpoints" / name, task.parameters, recorded)
    digest = parameters_root(tensor_leaves(weights))
    record = max((r for r in recorded if r.task == name and r.parameters_digest == digest), key=lambda r: r.round)
    folder = draft / name
    folder.mkdir()
    arrays = {key: np.ascontiguousarray(array) for key, array in named_arrays(weights).items()}
    facts = {"task": name, "network": stage.model.name, "round": str(record.round), "digest": digest}
    from safetensors.numpy import save

    (folder / "weights.safetensors").write_bytes(save(arrays, metadata=facts))
    network = getattr(stage, "network", stage.model)
    (folder / "network.json").write_text(network.model_dump_json(indent=1) + "\n", encoding="utf-8")
    for file, (function, shape) in programs.items():
        (folder / file).write_bytes(export_program(function(task, weights), shape))
    file = getattr(stage.model, "weights", "")
    return CardModel(
        initial=(Path(file).name, began.get(file, "not recorded")) if file else None,
        task=name,
        network=stage.model.name,
        parameters=sum(array.size for array in arrays.values()),
        round=record.round,
        digest=digest,
        inputs=inputs,
        files={f"{name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())},
    )


def _programs(config: StudyConfig, name: str, kinds: tuple[str, ...]) -> tuple[Task, dict[str, Any], str]:
    """The task, for each program its file, its function and the shape of one input, and what it takes in words."""
    seen = "the lung window" if config.data.volumes.window == "fixed" else "their scanner's window"
    if name == "segmentation":
        marking = config.segmentation
        assert marking is not None
        volume = config.data.field or (config.data.volumes.side,) * 3
        sizes = {tuple(volume[axis] for axis in plane_axes(plane)[1:]) for plane in marking.planes}
        channels = marking.model.in_channels
        programs = {
            f"program-{height}x{width}.stablehlo": (segmentation_function, (height, width, channels))
            for height, width in sorted(sizes)
        }
        words = f"slices `(batch, height, width, {channels})` of {seen} in [-0.5, 0.5]; a program per size"
        return make_segmentation_task(marking, seed=config.seed, pretrained=False), programs, words
    looking = config.classification
    assert looking is not None
    programs = {"program.stablehlo": (classification_function, (looking.side, looking.side, 1))}
    source = {"volume": f"CT slices in {seen}", "pictures": "grey pictures"}
    seen = " and ".join(source[kind] for kind in kinds)
    words = f"images `(batch, {looking.side}, {looking.side}, 1)` in [0, 1]: {seen}"
    if config.segmentation is not None:
        words += ", each times the probability that the segmentation gives its pixels"
    return make_classification_task(looking, seed=config.seed + 1, pretrained=False), programs, words
