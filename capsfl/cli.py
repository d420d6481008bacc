"""The command line: `capsfl train|sweep|ingest|phantom|predict|export|report|verify|ledger|epsilon|audit|...`."""

import logging
import os
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

COMMANDS = {
    "train": "CONFIG.toml [--dotted.name VALUE ...]   run or resume a study and write its page",
    "sweep": "CONFIG.toml [--dotted.name VALUE ...]   many studies in one program: privacy against utility",
    "ingest": "SOURCE OUT [--collection NAME] [--check] DICOM, NIfTI or pictures into standard volumes",
    "phantom": "OUT                                     chest-CT hospitals as real DICOM series",
    "predict": "RUN SCAN|PICTURE|FOLDER                 masks in each scan's own geometry, probabilities, pictures",
    "export": "RUN OUT                                 weights, programs and a model card to take away",
    "report": "RUN|SWEEP ... [--out PAGE]              write a page again; with --out all figures on one page",
    "verify": "RUN [--witness HEAD]                    recompute and check every ledger of a study",
    "ledger": "show|prove|check|export|witness         read a run's ledger, take proofs of its rounds away",
    "epsilon": "--hospitals H --noise-multiplier Z ...  privacy loss of a setting, or the setting for a loss",
    "audit": "--noise-multiplier Z ...                canaries against our own rounds: a lower bound on epsilon",
    "bench": "[NAME] [--quick]                        measure time and memory on this machine",
    "doctor": "                                        what works on this machine and what to install",
}
"""Every command with a line on it. It is a module of `capsfl.commands`, imported only when it is asked for."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; user errors end with one line on standard error and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        _print_summary()
        sys.exit(0 if words else 2)
    name, *words = words
    if name == "--version":
        from importlib.metadata import version

        print(version("capsfl"))
        return
    # Set before jax is imported, and inherited by worker processes: a second run compiles nothing again.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_folder() / "jax"))
    # Orbax abandons its other threads and reads when one fails; their echo says no more than our line.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    threading.excepthook = lambda _: None
    from pydantic import ValidationError

    from capsfl.settings import explain

    try:
        if name not in COMMANDS:
            raise ValueError(f"capsfl: unknown command {name!r}; one of {', '.join(COMMANDS)}")
        code = import_module(f"capsfl.commands.{name}").run(words)
    except ValidationError as error:
        _fail(explain(error, f"capsfl {name}"))
    except ValueError as error:
        _fail(_with_notes(str(error), error))
    except BrokenPipeError:
        # Whoever read our output has gone; what was asked for is done or needs no more words.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno is None:
            _fail(_with_notes(str(error), error))
        place = f"{error.filename}: " if error.filename else ""
        _fail(_with_notes(f"{place}{error.strerror}; check the path, its permissions and the free space", error))
    except KeyboardInterrupt as error:
        _fail(_with_notes("interrupted; run the same command again to resume", error), code=130)
    sys.exit(code)


def _print_summary() -> None:
    from rich.console import Console

    console = Console()
    console.print("[bold]capsfl[/] capsule networks for lung CT, trained federated with differential privacy\n")
    for name, text in COMMANDS.items():
        console.print(f"  capsfl {name:<8} {text}", highlight=False, markup=False, soft_wrap=True)
    console.print("\nEach command has its own --help.")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capsfl"


def _with_notes(message: str, error: BaseException) -> str:
    """A message with what was noted on its error: another one, which came up meanwhile."""
    return "; ".join([message, *getattr(error, "__notes__", ())])


def _fail(message: str, *, code: int = 2) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
