"""Figures as the words in a table's cells; `-` for what was not measured."""


def milliseconds(value: dict[str, float] | None) -> str:
    """The median of seconds, in milliseconds."""
    if value is None:
        return "-"
    milliseconds = 1e3 * value["median"]
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def mebibytes(value: int | None) -> str:
    """Bytes in MiB."""
    return "-" if value is None else f"{value / 2**20:.0f}" if value > 10 << 20 else f"{value / 2**20:.1f}"


def seconds(lower_s: float | None, compile_s: float | None) -> str:
    """Seconds of lowering and compiling together."""
    return "-" if compile_s is None else f"{(lower_s or 0) + compile_s:.1f}"


def number(value: float | None, form: str) -> str:
    """A figure in a format of `str.format`."""
    return "-" if value is None else form.format(value)
