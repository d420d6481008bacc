"""Progress of runs, read from the metrics they write, so that it looks the same from any process."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

INTERVAL_S = 0.5


@contextmanager
def show_rounds(runs: Mapping[str, Path], rounds: Mapping[str, int], *, console: Console) -> Iterator[None]:
    """Shows a bar per run while the body trains them; where there is no terminal, a line per finished stage.

    A hospital whose update was left out, for it held NaN or infinity, is named once per stage.

    Args:
        runs: name of every run and its folder.
        rounds: rounds of every stage, in order.
        console: where to; a quiet one is of a process that is not the first.
    """
    if console.quiet:
        yield
        return
    width = max(len(name) for name in runs)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
    bars = {name: progress.add_task(name.ljust(width), total=sum(rounds.values()), note="") for name in runs}
    said: set[tuple[str, ...]] = set()
    stop = Event()

    def update() -> None:
        for name, folder in runs.items():
            rows = read_rounds(folder / "metrics.jsonl")
            if not rows:
                continue
            progress.update(bars[name], completed=len(rows), note=summarise(rows[-1]))
            for row in rows:
                for hospital in row["not_finite"]:
                    if (name, row["task"], hospital) not in said:
                        said.add((name, row["task"], hospital))
                        console.print(
                            f"[yellow]warning[/] {name}: {row['task']} round {row['round']} leaves out {hospital}, "
                            "whose update was not finite; look at its scans, or lower the learning rate",
                            soft_wrap=True,
                            highlight=False,
                        )
                stage = (name, row["task"])
                if not console.is_terminal and row["round"] == rounds.get(row["task"]) and stage not in said:
                    said.add(stage)
                    console.print(f"  {name.ljust(width)}  {summarise(row)}", soft_wrap=True, highlight=False)

    def watch() -> None:
        while not stop.wait(INTERVAL_S):
            update()

    watcher = Thread(target=watch, daemon=True)
    if console.is_terminal:
        progress.start()
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        update()
        if console.is_terminal:
            progress.stop()


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """The rounds a run has written so far; a line still being written is left for later."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def summarise(row: Mapping[str, Any]) -> str:
    """One line about a round: stage, loss, mean validation scores, epsilon, hospitals left out."""
    words = [row["task"]]
    if row["loss"] is not None:
        words.append(f"loss {row['loss']:.3f}")
    for name in ("dice", "accuracy"):
        values: Sequence[float] = [scores[name] for scores in row["hospitals"].values() if name in scores]
        if values:
            words.append(f"{name} {np.mean(values):.2f}")
    if row["epsilon"] is not None:
        words.append(f"ε {row['epsilon']:.3g}")
    if row["not_finite"]:
        words.append(f"not finite: {', '.join(row['not_finite'])}")
    return " ".join(words)
