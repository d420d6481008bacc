"""A run from patients to results: stage after stage of federated rounds, then its scores and what its ledger holds."""

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np

from capsfl import evaluation
from capsfl.audit import audit_run, ledger_summary
from capsfl.curves import MetricsLog
from capsfl.federated.federation import RoundsConfig
from capsfl.federated.patients import records_by_hospital
from capsfl.learning.classification import Classifier, make_classification_task
from capsfl.learning.fusion import FILE as FUSION_FILE
from capsfl.learning.patients import Patient, permute_labels
from capsfl.learning.segmentation import Segmenter, cut_patches, make_segmentation_task
from capsfl.learning.tasks import Task
from capsfl.ledger.verify import Status
from capsfl.processes import by_first, is_first
from capsfl.profiling import RoundTrace, trace_folder
from capsfl.study import Split, write_json
from capsfl.training.founding import open_ledger
from capsfl.training.rounds import run_rounds
from capsfl.training.run import NEEDS, RECORDS, Run, plan_of_run


def train_run(run: Run, split: Split, controls: evaluation.Controls | None) -> None:
    """Trains one run through its stages and scores it on the patients never trained on.

    A finished run is left as it is; an unfinished one goes on from its last checkpoint. Of several processes the first
    keeps ledger, curves and results, and alone needs the controls.
    """
    if by_first(run.place, lambda: (run.folder / "results.json").exists()):
        return
    config, plan, split = run.config, plan_of_run(run, split), run.share_of(split)
    if run.arm.labels == "permuted":
        split = split._replace(train=permute_labels(split.train, seed=config.seed))
    with open_ledger(run, split) if is_first() else nullcontext() as ledger:
        metrics = MetricsLog(run.folder / "metrics.jsonl", member=run.member)
        trace = RoundTrace(trace_folder(run.folder) if run.profile else None)
        rounds, scans, judge = 0, None, None
        trained: dict[str, evaluation.Trained] = {}

        def learn(
            task: Task, stage: RoundsConfig, records_of: Callable[[Patient], dict[str, np.ndarray]]
        ) -> tuple[Any, dict[str, Any]]:
            """The server's weights after the rounds of one stage, and those of hospitals that have their own."""
            nonlocal rounds
            _, takes = NEEDS[task.name]

            def records(patients: Iterable[Patient]) -> dict[str, Any]:
                return records_by_hospital(filter(takes, patients), records_of, numbered=run.protects_patients)

            weights, own, rounds = run_rounds(
                run, task, stage, records(p for p in split.train if p.hospital in run.hospitals),
                records(split.validation), ledger, metrics, trace, plan=plan, rounds_before=rounds,
            )  # fmt: skip
            trained[task.name] = evaluation.Trained(task, weights, own)
            return weights, own

        if (marking := config.segmentation) is not None:
            task = make_segmentation_task(marking, seed=config.seed)
            learned = learn(
                task, marking, lambda p: cut_patches(p, marking, seed=evaluation.seed_of(config.seed, p.key))
            )
            scans = evaluation.Segmented(Segmenter(task, marking), *learned)
            if marking.fusion == "learned":
                fitted = scans.learn_fusion(split.validation, seed=config.seed)
                by_first("the fusion of the planes", lambda: write_json(run.folder / FUSION_FILE, fitted))
        if (looking := config.classification) is not None:
            task = make_classification_task(looking, seed=config.seed + 1)
            images = evaluation.Images(looking, scans)
            learned = learn(task, looking, images.records)
            judge = partial(evaluation.classify, Classifier(task, looking), *learned, images)

        def score() -> None:
            assert controls is not None
            classified = None if judge is None else judge(split, probe=run.member is None)
            results = evaluation.results(split, scans, classified, controls, config, plan.statement(rounds))
            if scans is not None:
                evaluation.write_overlays(run.folder, split, scans, results)
            if run.member is None:
                evaluation.write_interpretation(run.folder, split, trained, scans, config, results)
            findings = audit_run(run.folder, config, chain_id=run.chain_id)
            for finding in findings:
                if finding.status is Status.FAILED:
                    where = " ".join(str(w) for w in (finding.task, finding.round, finding.leaf) if w is not None)
                    raise ValueError(f"{run.folder}: {finding.check} {where}: {finding.detail}; see `capsfl verify`")
            assert ledger is not None
            write_json(run.folder / "ledger.json", ledger_summary(ledger, findings))
            shutil.rmtree(run.folder / RECORDS, ignore_errors=True)  # patients' images: no longer than needed
            write_json(run.folder / "results.json", results)

        by_first(f"the results of {run.place}", score)


def read_results(run: Run) -> dict[str, Any]:
    """What a finished run scored."""
    return json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
