"""`capsfl export RUN OUT`: a study's models in a folder that stands on its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from capsfl.arguments import parse


@dataclass(frozen=True)
class ExportCommand:
    """Take a study's models away: weights (safetensors), programs that need no capsfl (StableHLO), a model card."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder that `capsfl train` wrote."""
    out: Annotated[Path, tyro.conf.Positional]
    """A new folder for the models."""
    arm: str | None = None
    """The arm whose models are taken, or ARM/HOSPITAL where every hospital has its own; by default the first arm."""


def run(words: list[str]) -> int:
    """Writes a study's models into a folder that stands on its own."""
    given = parse(ExportCommand, words, prog="capsfl export")
    from capsfl.export.run import export_models
    from capsfl.study import disk_errors

    with disk_errors(given.out):
        print(f"model card: {export_models(given.run, given.out, arm_name=given.arm) / 'MODEL_CARD.md'}")
    return 0
