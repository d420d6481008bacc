"""A synthetic study folder: known numbers in every file that a page reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HOSPITALS = ("A", "B", "C")


def _lungs(size: int, *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An axial slice in HU with one lesion, its mask, and a prediction that misses a little of it."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    body = (columns / 0.47) ** 2 + (rows / 0.36) ** 2 < 1
    lungs = np.minimum(
        (np.abs(columns - 0.19) / 0.15) ** 2.4 + (np.abs(rows) / 0.25) ** 2.4,
        (np.abs(columns + 0.19) / 0.16) ** 2.4 + (np.abs(rows) / 0.26) ** 2.4,
    )
    centre = 0.16 * (1 if seed % 2 else -1), 0.1
    wobble = 0.008 * np.sin(3 * np.arctan2(rows - centre[1], columns - centre[0]))
    distance = np.hypot(columns - centre[0], rows - centre[1]) + wobble
    truth = (distance < 0.075) & (lungs < 1)
    hu = np.where(body, np.where(lungs < 1, -850.0, 40.0), -1000.0) + np.where(truth, 420.0, 0.0)
    hu = hu + generator.normal(scale=30, size=hu.shape)
    prediction = (0.5 - 0.5 * np.tanh((distance - 0.07) * 80)) * (lungs < 1)
    return hu.astype(np.float32), truth, prediction.astype(np.float32)


def _decision_metrics(auc: float, patients: int) -> dict[str, float]:
    return {
        "auc": auc,
        "auc_low": auc - 0.07,
        "auc_high": min(1.0, auc + 0.05),
        "balanced_accuracy": auc - 0.06,
        "sensitivity": 0.91,
        "specificity": 2 * (auc - 0.06) - 0.91,
        "precision": 0.87,
        "threshold": 0.437,
        "patients": patients,
        "positives": patients // 2,
    }


def _results(auc: float, dice: float, epsilon: float | None) -> dict[str, Any]:
    generator = np.random.default_rng(5)
    scores = [
        {
            "patient": f"P{number:03d}",
            "hospital": HOSPITALS[number % 3],
            "label": number % 2,
            "score": float(np.clip(generator.normal(0.3 + 0.36 * (number % 2), 0.16), 0, 1)),
        }
        for number in range(72)
    ]
    privacy = {
        "epsilon": epsilon,
        "delta": 1e-5,
        "relation": "add or remove one hospital",
        "unit": "hospital",
        "accountant": "PLD",
        "statement": f"Adding or removing one hospital changes any outcome's odds by at most e^{epsilon}.",
    }
    false = np.linspace(0, 1, 31)
    return {
        "privacy": privacy if epsilon is not None else None,
        "segmentation": {
            "overall": {"dice": dice, "dice_low": dice - 0.04, "dice_high": dice + 0.03},
            "planes": {"xy": dice - 0.01, "yz": dice - 0.06, "xz": dice - 0.05, "fused": dice},
            "hospitals": {name: {"dice": dice + 0.013 * place} for place, name in enumerate(HOSPITALS)},
            "controls": {"HU threshold": {"dice": 0.4123}},
        },
        "classification": {
            "overall": _decision_metrics(auc, 72),
            "hospitals": {name: _decision_metrics(auc - 0.011 * n, 24) for n, name in enumerate(HOSPITALS)},
            "controls": {
                "always positive": {"auc": 0.5, "balanced_accuracy": 0.5, "sensitivity": 1, "specificity": 0,
                                    "precision": 0.5, "patients": 72, "positives": 36},
                "permuted labels": {"auc": 0.4817, "balanced_accuracy": 0.49, "sensitivity": 0.61},
                "dense lung fraction": {"auc": 0.7719, "balanced_accuracy": 0.71, "sensitivity": 0.8},
            },
            "roc": {
                "false_positive_rate": false.tolist(),
                "true_positive_rate": (false ** ((1 - auc) / auc)).tolist(),
            },
            "scores": scores,
        },
        "overlays": [
            {"patient": f"P{n:03d}", "hospital": HOSPITALS[n % 3], "plane": ("xy", "xz")[n // 2 % 2],
             "index": 40 + n, "dice": dice, "truth": True, "key": str(n)}
            for n in range(4)
        ],
    }  # fmt: skip


def _rounds(task: str, *, member: str = "", epsilon: float | None = None) -> list[dict[str, Any]]:
    rows = []
    for place in range(1, 21):
        progress = 1 - np.exp(-place / 6)
        names = [member] if member else HOSPITALS
        hospitals = {
            name: {
                "loss": 0.9 - 0.6 * progress + 0.03 * (ord(name) % 4) + 0.02 * np.sin(place * 1.7 + ord(name)),
                "accuracy": min(1.0, 0.5 + 0.42 * progress - 0.03 * (ord(name) % 3)),
                "sensitivity": min(1.0, 0.4 + 0.5 * progress + 0.03 * np.cos(place + ord(name))),
            }
            | ({"dice": 0.8 * progress - 0.02 * (ord(name) % 3)} if task == "segmentation" else {})
            for name in names
        }
        row = {
            "task": task,
            "round": place,
            "loss": 0.9 - 0.58 * progress,
            "seconds": 1.3,
            "cpu_seconds": 2.2,
        }
        row |= {
            "epsilon": epsilon * (place / 20) ** 0.5 if epsilon else None,
            "peak_memory_bytes": 700_000_000,
        }
        row |= {"cohort": list(names), "update_norm": 0.2 + 1.2 * (1 - progress), "hospitals": hospitals}
        rows.append(row | ({"member": member} if member else {}))
    return rows


def _ledger(blocks: int) -> dict[str, Any]:
    rounds = [
        {"height": n, "task": "classification", "round": n, "digest": f"{n * 7919:064x}"[::-1],
         "epsilon": 0.4 * n, "cohort": list(HOSPITALS)}
        for n in range(1, blocks)
    ]  # fmt: skip
    checks = ("signature", "merkle root", "configuration hash", "tensor digest")
    findings = [
        {
            "check": check,
            "status": "ok",
            "round": n,
            "task": "classification",
            "leaf": "",
            "detail": "recomputed",
        }
        for n in range(1, blocks)
        for check in checks
    ]
    findings.append(
        {"check": "votes", "status": "unverifiable", "round": 3, "task": "classification", "leaf": "",
         "detail": "validation data not at hand"}
    )  # fmt: skip
    return {
        "blocks": blocks, "head": "c0ffee" * 10 + "beef", "root": "ab" * 32, "chain_id": "demo-2f9a",
        "signer": "02" + "5e" * 32, "rounds": rounds, "findings": findings,
    }  # fmt: skip


def write_study_folder(folder: Path, *, arms: tuple[str, ...] = ("federated", "private", "pooled", "local")) -> Path:
    """Write a whole study into `folder`; tests then change or delete files of it."""
    folder.mkdir(parents=True)
    record = {
        "name": "demo",
        "arms": list(arms),
        "primary": arms[0],
        "configuration": {
            "seed": 7,
            "planes": ["xy", "yz"],
            "privacy": {"noise_multiplier": 1.125, "clip_norm": 0.5},
        },
        "configuration_hash": "d1ce" * 16,
        "versions": {"capsfl": "0.1.0", "jax": "0.10.2"},
        "device": "cpu, 2 cores",
        "seconds": 212.0,
        "cpu_seconds": 361.0,
        "peak_memory_bytes": 1_610_612_736,
        "stages": [
            {"name": name, "seconds": wall, "cpu_seconds": 1.7 * wall}
            for name, wall in (("phantom", 21.0), ("ingest", 9.5), ("segmentation", 96.0),
                               ("classification", 74.0), ("verification", 7.5), ("report", 4.0))
        ],
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(record))
    figures = {
        "federated": (0.9126, 0.7834, None),
        "private": (0.8312, 0.6921, 17.94),
        "pooled": (0.9345, 0.8011, None),
        "local": (0.8433, 0.7102, None),
    }
    for arm in arms:
        auc, dice, epsilon = figures[arm]
        (folder / arm).mkdir()
        members = HOSPITALS if arm == "local" else ("",)
        rows = [
            row
            for task in ("segmentation", "classification")
            for member in members
            for row in _rounds(task, member=member, epsilon=epsilon and epsilon * (1 - 0.3 * (task == "segmentation")))
        ]
        (folder / arm / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = _results(auc, dice, epsilon)
        if arm == "local":
            results["members"] = {
                name: _results(auc - 0.0301 + 0.02 * n, dice - 0.02, None) for n, name in enumerate(HOSPITALS)
            }
        (folder / arm / "results.json").write_text(json.dumps(results))
        arrays = {}
        for n in range(4):
            hu, truth, prediction = _lungs(96, seed=n)
            arrays |= {f"hu_{n}": hu, f"truth_{n}": truth, f"prediction_{n}": prediction, f"aspect_{n}": 1.0}
        np.savez(folder / arm / "overlays.npz", **arrays)
        if arm in {"federated", "private"}:
            (folder / arm / "ledger.json").write_text(json.dumps(_ledger(14)))
    return folder


@pytest.fixture(scope="session")
def write_study() -> Callable[..., Path]:
    """The writer of synthetic studies: `write_study(folder, arms=...)`."""
    return write_study_folder
