"""`capsfl train CONFIG.toml`: runs or resumes a study and writes its page."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from capsfl.arguments import parse_config
from capsfl.config import StudyConfig, choose_by_name, load_config


class TrainCommand(StudyConfig):
    """A study, and how to run it this time."""

    profile: tyro.conf.UseCounterAction[int] = 0
    """Write a trace of a few rounds of the first arm into its folder, for TensorBoard, Perfetto or XProf."""


def run(words: list[str]) -> int:
    """Runs or resumes a study."""
    given = parse_config(
        words, load, prog="capsfl train", noun="study", blank=StudyConfig.example(), example="configs/demo.toml"
    )
    config = StudyConfig(**{field: getattr(given, field) for field in StudyConfig.model_fields})
    from capsfl.processes import is_first, joined
    from capsfl.study import disk_errors
    from capsfl.train import train

    with joined(config.devices), disk_errors(Path(config.out)):
        console = Console(quiet=not is_first())
        typed = shlex.join(["capsfl", "train", *map(str, words)])
        page = train(config, console=console, profile=given.profile > 0, command=typed)
    console.print(f"page: {page}", soft_wrap=True, highlight=False)
    return 0


def load(path: Path, changes: Sequence[str]) -> TrainCommand:
    """A study's file, with the sections of other networks and collections that the words after it name."""
    return TrainCommand(**dict(choose_by_name(load_config(path), changes)))
