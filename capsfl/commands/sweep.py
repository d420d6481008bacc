"""`capsfl sweep CONFIG.toml`: many studies in one program, privacy against utility."""

import shlex
from pathlib import Path

from rich.console import Console

from capsfl.arguments import parse_config
from capsfl.sweeps.config import SweepConfig, load_sweep


def run(words: list[str]) -> int:
    """Runs or resumes a sweep."""
    config = parse_config(
        words,
        lambda path, _: load_sweep(path),
        prog="capsfl sweep",
        noun="sweep",
        blank=SweepConfig(),
        example="configs/sweep_privacy.toml",
    )
    from capsfl.study import disk_errors
    from capsfl.sweeps.cores import one_device_per_core
    from capsfl.sweeps.run import run_sweep

    one_device_per_core()
    console = Console()
    with disk_errors(Path(config.out)):
        folder = run_sweep(config, console=console, command=shlex.join(["capsfl", "sweep", *map(str, words)]))
    console.print(f"page: {folder / 'report.html'}", soft_wrap=True, highlight=False)
    return 0
