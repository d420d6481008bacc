"""`capsfl phantom OUT`: chest-CT hospitals as real DICOM series."""

from pathlib import Path
from typing import Annotated

import tyro

from capsfl.arguments import parse
from capsfl.ct.phantom import PhantomConfig, write_hospitals


class PhantomCommand(PhantomConfig):
    """Write seeded chest-CT hospitals as real DICOM series with lesion masks and a manifest."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder for the series, masks/ and manifest.csv."""
    processes: int | None = None
    """Patients rendered at once; by default one per core."""


def run(words: list[str]) -> int:
    """Writes phantom hospitals."""
    given = parse(PhantomCommand, words, prog="capsfl phantom")
    config = PhantomConfig(**given.model_dump(exclude={"out", "processes"}))
    manifest = write_hospitals(given.out, config=config, processes=given.processes)
    print(f"manifest: {manifest}")
    return 0
