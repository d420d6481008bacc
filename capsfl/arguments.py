"""Words of the command line into a typed value; a mistake becomes one line instead of tyro's panel."""

import io
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

import tyro
from pydantic import ValidationError

from capsfl.settings import explain

T = TypeVar("T")

SECTIONS = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
"""How the sections of a configuration become options: by their dotted names, switches with True or False."""


class ArgumentsError(ValueError):
    """Words that make no sense; the message names the option, the value and where to read on."""


def parse(form: type[T], words: Sequence[str], *, prog: str, **options: Any) -> T:
    """Reads words into a value of `form` by `tyro.cli`; `--help` prints and exits.

    Args:
        form: dataclass or pydantic model whose attributes are the options.
        words: the words after the command's name.
        prog: the command, as messages and help name it.
        **options: further arguments of `tyro.cli`.

    Raises:
        ArgumentsError: unknown or missing option, or a value of a wrong type or out of range.
    """
    panel = io.StringIO()
    try:
        with redirect_stderr(panel):
            return tyro.cli(form, args=list(words), prog=prog, **options)
    except SystemExit as refusal:
        if not refusal.code:
            raise
        lines = _text_lines(panel.getvalue())
        invalid = _validation_behind(refusal)
        if invalid is not None:
            # Of a section, pydantic knows the fields below it, and tyro the section.
            section = re.search(r"Error parsing (\S+):", " ".join(lines))
            name = section[1] if section and section[1] != form.__name__ else ""
            raise ArgumentsError(explain(invalid, prog, section=name)) from None
        raise ArgumentsError(f"{prog}: {_sentence(lines)}; see `{prog} --help`") from None


def parse_config(
    words: Sequence[str],
    load: Callable[[Path, Sequence[str]], T],
    *,
    prog: str,
    noun: str,
    blank: Any,
    example: str,
) -> T:
    """Reads `CONFIG.toml [--dotted.name VALUE ...]`: the file's values, and over them those of the options.

    Args:
        words: the words after the command's name.
        load: reads the file, knowing the words after it.
        prog: the command.
        noun: what it runs.
        blank: what --help shows where no file is named before it.
        example: a file to begin with.

    Raises:
        ArgumentsError: no file is named, or as `parse` does.
    """
    if words and words[0] in ("-h", "--help"):
        description = f"Run or resume a {noun}; a CONFIG.toml before --help shows its own values as defaults."
        return parse(
            type(blank), words[:1], prog=f"{prog} CONFIG.toml", description=description, default=blank, config=SECTIONS
        )
    if not words or words[0].startswith("-"):
        raise ArgumentsError(f"{prog}: name a configuration first, such as {example}")
    path, *changes = words
    default = load(Path(path), changes)
    return parse(
        type(default),
        changes,
        prog=f"{prog} {Path(path)}",
        description=f"Run or resume the {noun} of {Path(path)}; defaults below are the file's values.",
        default=default,
        config=SECTIONS,
    )


def _text_lines(panel: str) -> list[str]:
    """The lines of a panel without title and frame, which are drawn in ASCII where the output takes no more."""
    lines = [text for line in panel.splitlines() if (text := line.strip("│ "))]
    # The title is a part of the upper frame, or stands over a rule.
    inside = lines[1:-1] if panel.startswith("╭") else lines[2:]
    return ["" if set(line) <= {"─", "-"} else line for line in inside]


def _sentence(lines: list[str]) -> str:
    """What is wrong, and what tyro guesses was meant."""
    before, _, after = "\n".join(lines).partition("\n\n")
    words = " ".join(before.split()).split(" Got errors:")[0]
    missing = re.fullmatch(r"Missing from [^:]+: (.*)", words)
    if missing:
        return f"missing {missing[1]}"
    guess = re.search(r"Perhaps you meant:\s+(--\S+)", after)
    return f"{words}; perhaps you meant {guess[1]}" if guess else words.removesuffix(".")


def _validation_behind(refusal: SystemExit) -> ValidationError | None:
    """The validation error that tyro turned into an exit, found along the chain of exceptions."""
    error: BaseException | None = refusal
    while error is not None and not isinstance(error, ValidationError):
        error = error.__cause__ or error.__context__
    return error
