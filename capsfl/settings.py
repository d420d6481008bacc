"""The base of every configuration section: strict, frozen, hashable, documented; and what its refusals say."""

import json

from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """A frozen section of the configuration.

    Unknown keys, wrong types (a bool for an int, a string for a float) and non-finite numbers are refused;
    instances hash, so they serve as static arguments of jitted functions. Sequences are tuples and choices
    are `Literal`, for the same reason.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def explain(error: ValidationError, source: str, *, section: str = "", command: str = "capsfl train CONFIG") -> str:
    """Turns pydantic's findings into one line each: source, dotted field, value, what was expected.

    Args:
        error: the refusal.
        source: file or command that the values came from.
        section: dotted name of the section that was refused; empty for the whole.
        command: whose help lists the known keys.
    """
    lines = []
    for finding in error.errors(include_url=False):
        # The tag of a union, in angle brackets, is no field.
        trail = [str(part) for part in finding["loc"] if not str(part).startswith("<")]
        field = ".".join([section] * bool(section) + trail)
        message = finding["msg"].removeprefix("Value error, ")
        if finding["type"] == "extra_forbidden":
            message = f"unknown key; see `{command} --help` for the known ones"
        elif finding["type"] == "missing":
            message = "missing; add it"
        elif finding["loc"]:
            message = f"= {json.dumps(finding['input'], default=str)[:80]}: {message}"
        lines.append(f"{source}: {field + ' ' if field else ''}{message}")
    return "\n".join(lines)
