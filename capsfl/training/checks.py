"""What a study refuses, or warns of, before any time goes into training."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from capsfl import evaluation
from capsfl.config import StudyConfig
from capsfl.consensus import caution_of_votes, check_block_size
from capsfl.federated.batch_norm import make_batch_norm
from capsfl.federated.private_local import local_update_of
from capsfl.learning.classification import make_classification_task
from capsfl.learning.fusion import NO_MASKS, FusionError
from capsfl.privacy.plan import PrivacyPlan
from capsfl.study import Split
from capsfl.training.run import NEEDS, Run, plan_of_run


def check_before_training(config: StudyConfig, split: Split, runs: Sequence[Run]) -> None:
    """Refuses what could not be trained or scored, before any time goes into it.

    Raises:
        ValueError: a hospital without training records for a stage, nothing to score it on, a privacy section that
            contradicts itself or the number of hospitals, a budget spent before the last stage begins, or statements of
            hospitals that no block of the ledger holds.
    """
    for stage in config.stages:
        column, has = NEEDS[stage]
        for hospital in sorted({patient.hospital for patient in split.train}):
            if not any(has(patient) for patient in split.train if patient.hospital == hospital):
                raise ValueError(
                    f"data.source: {hospital} has no training patient with a {column}, which {stage} needs; fill in "
                    f"the manifest's {column} column or leave the hospital out"
                )
        if not any(has(patient) for patient in split.test):
            raise ValueError(
                f"data.source: no test patient has a {column}, so {stage} cannot be scored; fill in the manifest's "
                f"{column} column or hold out other patients"
            )
    learned = config.segmentation is not None and config.segmentation.fusion == "learned"
    if learned and not any(patient.truth is not None and patient.truth.any() for patient in split.validation):
        raise FusionError(NO_MASKS)
    if config.classification is not None:
        check_labels(config.classification.num_classes, split)
    for run in runs:
        if run.arm.partition == "leave-one-out":
            check_left_out(run, split)
        if run.arm.partition == "local":
            check_alone(run, split)
        plan = plan_of_run(run, split)
        check_network(run, plan)
        holders = run.places or run.holders
        check_block_size(run.config.consensus, run.config.stages, hospitals=holders, cohort=plan.num_slots)
        target = run.config.privacy.target_epsilon
        if target is None:
            continue
        allowed, spent = plan.max_rounds(target), 0
        for name, stage in run.config.stages.items():
            if allowed <= spent:
                raise ValueError(
                    f"privacy.target_epsilon = {target}: spent after {allowed} rounds, before {name} of {run.place} "
                    "begins; raise it, add noise, or give the stages before fewer rounds"
                )
            spent += stage.rounds


def check_network(run: Run, plan: PrivacyPlan) -> None:
    """Refuses a classifier that its file of weights does not fit, or whose normalisation the privacy does not allow.

    The network is built where that may be so: an arm has its turn after those before it, perhaps hours later.

    Raises:
        ValueError: names the file or the field.
    """
    stage = run.config.classification
    if stage is None:
        return
    network = stage.model
    strict = plan.noises_sum or plan.config.local_epsilon is not None or run.protects_patients
    strict = strict or stage.aggregation.secure or stage.aggregation.rule == "mae_votes"
    if getattr(network, "weights", "") or (strict and getattr(network, "norm", "") == "batch"):
        task = make_classification_task(stage, seed=run.config.seed)
        make_batch_norm(stage.batch_norm, task, plan, stage.aggregation)
        local_update_of(task, stage.local, plan)


def weights_of(config: StudyConfig) -> dict[str, str]:
    """SHA-256 of every file of weights that a training of the study starts from, by its path as configured.

    A file that is no longer there has none: a run that has begun needs it no more.
    """
    stages = [stage for arm in config.arms for stage in config.arm(arm).stages.values()]
    files = sorted({found for stage in stages if (found := getattr(stage.model, "weights", ""))})
    return {file: sha256(Path(file).read_bytes()).hexdigest() for file in files if Path(file).is_file()}


def check_left_out(run: Run, split: Split) -> None:
    """Refuses to leave out a hospital that nobody else could judge, or that has nobody to be judged.

    Raises:
        ValueError: names the arm, the hospital and what is missing.
    """
    arm, mine = f"arms.partition = leave-one-out ({run.arm.name})", run.share_of(split)
    if not run.hospitals:
        raise ValueError(f"{arm}: {run.member} is the only hospital; name a second one, or leave the arm out")
    for stage in run.config.stages:
        column, has = NEEDS[stage]
        if not any(has(patient) for patient in mine.test):
            raise ValueError(
                f"{arm}: {run.member} has no test patient with a {column}, so nothing would be judged without it; hold "
                "out other patients, or leave the arm out"
            )
    learned = run.config.segmentation is not None and run.config.segmentation.fusion == "learned"
    if learned and not any(patient.truth is not None and patient.truth.any() for patient in mine.validation):
        raise ValueError(
            f'{arm}: without {run.member} no validation patient has a mask, which segmentation.fusion = "learned" '
            "needs; choose another fusion, or hold out other patients"
        )


def check_alone(run: Run, split: Split) -> None:
    """Refuses a hospital that would have to fit a fusion to masks that it does not hold.

    Without validation patients its classifier decides at 1/2.

    Raises:
        ValueError: names the arm and the hospital.
    """
    learned = run.config.segmentation is not None and run.config.segmentation.fusion == "learned"
    mine = run.share_of(split).validation
    if learned and not any(patient.truth is not None and patient.truth.any() for patient in mine):
        raise ValueError(
            f"arms.partition = local ({run.arm.name}): {run.member} has no validation patient with a mask, which "
            'segmentation.fusion = "learned" needs; choose another fusion, or hold out other patients'
        )


def check_labels(classes: int, split: Split) -> None:
    """Refuses labels that are no class of the network.

    Raises:
        ValueError: names the first patient with such a label.
    """
    for patient in (*split.train, *split.validation, *split.test):
        if patient.label is not None and not 0 <= patient.label < classes:
            raise ValueError(
                f"classification.classes = {classes}: {patient.key} has label {patient.label}, and classes count from "
                f"0; set classification.classes = {patient.label + 1}, or merge classes in the manifest"
            )


def cautions_of(runs: Sequence[Run], split: Split) -> tuple[str, ...]:
    """What whoever starts these runs should know beforehand, each once."""
    plans = [(run.config.stages, plan_of_run(run, split)) for run in runs]
    found = [plan.caution() for _, plan in plans]
    found += [caution_of_votes(stages, plan.expected_cohort) for stages, plan in plans]
    if lost := evaluation.outside_field(split.test):
        found.append(f"data.field leaves out {lost:.1%} of what the test patients' masks mark; it counts as missed")
    return tuple(dict.fromkeys(caution for caution in found if caution))
