"""A sweep from configuration to page: expand, group, compile once a group, run in portions, keep what is finished."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from capsfl.clock import Stopwatch
from capsfl.report.sweep import build_sweep_page
from capsfl.sweeps.config import ExecutionConfig, SweepConfig
from capsfl.sweeps.points import TRACED, Study, describe, expand, group_key, plan_of, resolve, statement_of
from capsfl.sweeps.problems import Built, Problem, build
from capsfl.sweeps.program import GroupProgram
from capsfl.sweeps.results import Row, SweepFolder, merge_results, read_rows
from capsfl.sweeps.width import make_program


def run_sweep(config: SweepConfig, *, console: Console, command: str = "") -> Path:
    """Runs or resumes a sweep, or one process's share of it.

    Args:
        config: the whole configuration.
        console: where progress goes.
        command: what was typed, for the pages that say how to make a figure again.

    Returns:
        The folder, with `results.jsonl`, `results.csv`, `frontier.png`, `frontier.svg` and `report.html` of all
        studies finished by then.

    Raises:
        ValueError: anything a user can mend, in one line that names the file or field.
    """
    part, parts = share_of(config.execution.part, os.environ)
    devices = choose_devices(config.execution)
    groups = group(expand(config), console=console)
    total = sum(len(members) for members in groups)
    built = build(groups[0][0].point.problem)
    record = {"studies": total, "groups": len(groups), "utility": built.utility, "scored": built.scored}
    record |= {"axes": axes_of(config), "command": command}
    with SweepFolder.open(config, part=part, parts=parts, record=record) as folder:
        done = read_rows(folder.path)
        mine = take_share(groups, part, parts)
        waiting = [[study for study in members if study.number not in done] for members in mine]
        waiting = [members for members in waiting if members]
        left = sum(map(len, waiting))
        of_part = f", part {part} of {parts}" if parts > 1 else ""
        console.print(
            f"[bold]{total}[/] studies, compiled groups {len(groups)}{of_part}: {left} to run on "
            f"{len(devices)} x {devices[0].device_kind}, {len(done)} finished before",
            highlight=False,
        )
        watch, facts = Stopwatch(), []
        with progress_bar(console) as bar:
            task = bar.add_task("studies", total=left)
            for number, members in enumerate(waiting, start=1):
                facts.append(run_group(config, members, folder, devices, partial(bar.advance, task)))
                if not console.is_terminal:
                    console.print(f"  group {number} of {len(waiting)}: {len(members)} studies", highlight=False)
        if waiting:
            device = f"{len(devices)} x {devices[0].device_kind}"
            folder.record_execution({"part": part, "parts": parts, "device": device, "groups": facts, **watch.read()})
        finished = len(merge_results(folder.path))
    if finished < total:
        console.print(f"{total - finished} studies are still missing: other parts, or run the same command again")
    build_sweep_page(folder.path)
    return folder.path


def group(studies: Sequence[Study], *, console: Console) -> list[list[Study]]:
    """Solves and checks every study, and sorts those together that one compiled program can serve."""
    groups: dict[Any, list[Study]] = {}
    hospitals: dict[Problem, int] = {}
    with console.status("privacy of every study"):
        for study in studies:
            problem = study.point.problem
            if problem not in hospitals:
                hospitals[problem] = len(build(problem).hospitals)
            number = hospitals[problem]
            resolved = resolve(study, num_hospitals=number)
            groups.setdefault(group_key(resolved.point, num_hospitals=number), []).append(resolved)
    return list(groups.values())


def run_group(
    config: SweepConfig, studies: Sequence[Study], folder: SweepFolder, devices: Sequence[Any], advance: Any
) -> dict[str, Any]:
    """Runs the studies of one group in portions, each written when it is finished.

    Returns:
        What was compiled and how long the group took.
    """
    watch = Stopwatch()
    built = build(studies[0].point.problem)
    points = [study.point for study in studies]
    plans = [plan_of(point, num_hospitals=len(built.hospitals)) for point in points]
    plan = max(plans, key=lambda plan: plan.num_slots)
    noisy = any(plan.noises_sum for plan in plans)
    default = 1 if devices[0].platform == "cpu" else plan.num_slots

    def make(width: int, passes: int) -> GroupProgram:
        hospitals = config.execution.hospitals or default
        return GroupProgram(
            points[0], built, plan, devices=devices, width=width, passes=passes, hospitals=hospitals, noisy=noisy
        )

    program, facts = make_program(make, points, config=config.execution, devices=devices)
    rest, passes = list(studies), 1
    while rest:
        size = passes * program.width * len(devices)
        portion, rest = rest[:size], rest[size:]
        start = time.perf_counter()
        folder.append(run_portion(program, portion, built, evaluate_every=config.evaluate_every))
        pass_s = (time.perf_counter() - start) / -(-len(portion) // (program.width * len(devices)))
        passes = max(1, min(program.passes, int(config.execution.save_every_s / pass_s)))
        advance(len(portion))
    return {"studies": len(studies), "setting": _static(studies), **facts, **watch.read()}


def run_portion(
    program: GroupProgram, portion: Sequence[Study], built: Built, *, evaluate_every: int | None = None
) -> list[Row]:
    """Runs up to `program.capacity` studies to their end; returns their rows."""
    watch = Stopwatch()
    count, rounds = len(portion), portion[0].point.training.rounds
    every = evaluate_every or max(1, rounds // 10)
    studies, progress = program.place([study.point for study in portion])
    curves: list[list[dict[str, Any]]] = [[] for _ in portion]
    scores: list[Any] = []
    for first in range(0, rounds, every):
        last = min(first + every, rounds)
        progress, scores = program.advance(studies, progress, count=count, first=first, last=last)
        for curve, own in zip(curves, scores, strict=True):
            curve.append({"round": last, **pooled(own)})
    losses = program.collect(progress.losses, count)
    left_out = program.collect(progress.left_out, count)
    seconds = {name: round(watch.read()[name] / count, 4) for name in ("seconds", "cpu_seconds")}
    return [
        make_row(study, built, curve, scores_, losses_, int(out)) | seconds
        for study, curve, scores_, losses_, out in zip(portion, curves, scores, losses, left_out, strict=True)
    ]


def make_row(
    study: Study, built: Built, curve: list[dict[str, Any]], scores: Any, losses: np.ndarray, left_out: int
) -> Row:
    """One study's line: its setting, what it guarantees, how well it does."""
    point = study.point
    statement = statement_of(point, num_hospitals=len(built.hospitals))
    known = losses[~np.isnan(losses)]  # rounds in which somebody took part
    loss = finite(known[-1]) if len(known) else None
    final = {name: value for name, value in curve[-1].items() if name != "round"}
    diverged = loss is None or final[built.utility] is None
    per_hospital = {}
    if len(built.held_out) > 1:
        per_hospital = {
            name: pooled(jax.tree.map(lambda leaf, at=place: leaf[at : at + 1], scores))
            for place, name in enumerate(built.held_out.names)
        }
    return {
        "study": study.number,
        "seed": point.seed,
        "setting": dict(study.setting),
        "group": describe(_static_of(study)),
        "rounds": point.training.rounds,
        "target_epsilon": study.target_epsilon,
        "epsilon": statement.epsilon,
        "delta": statement.delta,
        "relation": statement.relation,
        "unit": statement.unit,
        "accountant": statement.accountant,
        "clip_norm": point.privacy.clip_norm,
        "noise_multiplier": point.privacy.noise_multiplier,
        "truncation": plan_of(point, num_hospitals=len(built.hospitals)).mechanism.truncation,
        "utility": final[built.utility],
        "scores": final,
        "loss": loss,
        "left_out": left_out,
        "status": "diverged" if diverged else "finished",
        "curve": curve,
        "losses": [finite(value) for value in losses],
        "hospitals": per_hospital,
    }


def pooled(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """Each score over all held-out hospitals together; None where it is not defined or not finite."""
    found = {}
    for name, (numerator, denominator) in sorted(scores.items()):
        top, bottom = float(np.sum(numerator, dtype=np.float64)), float(np.sum(denominator, dtype=np.float64))
        found[name] = finite(top / bottom) if bottom > 0 else None
    return found


def finite(value: Any) -> float | None:
    """A float that JSON can hold, else None."""
    return float(value) if math.isfinite(value) else None


def share_of(part: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's share and the number of shares.

    `auto` reads SLURM's task (SLURM_PROCID of SLURM_NTASKS) or array task (SLURM_ARRAY_TASK_ID of
    SLURM_ARRAY_TASK_COUNT, ids from 0), or an indexed Job of Kubernetes (JOB_COMPLETION_INDEX of CAPSFL_PARTS).

    Raises:
        ValueError: a share that does not exist, or no environment to read one from.
    """
    if part == "auto":
        for own, all_ in (
            ("JOB_COMPLETION_INDEX", "CAPSFL_PARTS"),
            ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
            ("SLURM_PROCID", "SLURM_NTASKS"),
        ):
            if own in environment and all_ in environment:
                part = f"{environment[own]}/{environment[all_]}"
                break
        else:
            raise ValueError(
                "execution.part = auto: neither SLURM nor a Kubernetes indexed Job with CAPSFL_PARTS is here; "
                "give --part 0/8 and so on"
            )
    if not part:
        return 0, 1
    index, _, number = part.partition("/")
    if not (index.isdigit() and number.isdigit() and int(index) < int(number)):
        raise ValueError(f"execution.part = {part}: expected a share from 0/{number or 8} to one below the last number")
    return int(index), int(number)


def take_share(groups: Sequence[Sequence[Study]], part: int, parts: int) -> list[list[Study]]:
    """The studies of one share: a contiguous run of the groups' order, so that few groups are cut."""
    total = sum(map(len, groups))
    low, high = part * total // parts, (part + 1) * total // parts
    shares, place = [], 0
    for members in groups:
        own = [study for at, study in enumerate(members, start=place) if low <= at < high]
        place += len(members)
        if own:
            shares.append(own)
    return shares


def choose_devices(config: ExecutionConfig) -> list[Any]:
    """The devices that studies are spread over.

    Raises:
        ValueError: more are asked for than there are.
    """
    devices = jax.local_devices()
    if config.devices is not None and config.devices > len(devices):
        raise ValueError(f"execution.devices = {config.devices}: there are {len(devices)}; ask for no more than that")
    return devices[: config.devices]


def axes_of(config: SweepConfig) -> list[dict[str, Any]]:
    """The swept fields and the values they take, for the page."""
    values: dict[str, list[Any]] = {}
    for study in expand(config):
        for field, value in study.setting:
            if value not in values.setdefault(field, []):
                values[field].append(value)
    values["seed"] = list(config.sweep.seeds)
    return [{"field": field, "values": json.loads(json.dumps(found))} for field, found in values.items()]


def progress_bar(console: Console) -> Progress:
    """A bar over studies; nothing where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, *times, console=console, disable=not console.is_terminal)


def _static_of(study: Study) -> tuple[tuple[str, Any], ...]:
    """The part of a setting that groups are made by."""
    return tuple((field, value) for field, value in study.setting if field not in TRACED and field != "target_epsilon")


def _static(studies: Sequence[Study]) -> str:
    return describe(_static_of(studies[0]))
