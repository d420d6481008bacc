"""Numbers as a reader of a report expects them; what is no finite number becomes a dash.

A unit stays on the line of its number: the spaces between them do not break.
"""

import math
from typing import Any

from capsfl.report.study import Record, number, number_at

NO_VALUE = "–"


def decimals(value: Any, places: int = 3) -> str:
    """A number with fixed decimals; a dash if it is none."""
    found = number(value)
    return NO_VALUE if found is None else f"{found:.{places}f}".replace("-", "−")


def signed(value: Any, places: int = 3) -> str:
    """A difference with its sign; a dash if it is no number."""
    found = number(value)
    return NO_VALUE if found is None else f"{found:+.{places}f}".replace("-", "−")


def significant(value: Any) -> str:
    """A number with three significant digits, never in exponent form below a million."""
    found = number(value)
    if found is None:
        return NO_VALUE
    return f"{found:.0f}" if 100 <= abs(found) < 1e6 else f"{found:.3g}".replace("-", "−")


def duration(value: Any) -> str:
    """Seconds as a reader says them: `3.4 s`, `2 min 05 s`, `1 h 12 min`."""
    found = number(value)
    if found is None:
        return NO_VALUE
    if found < 60:
        return f"{found:.2g}\u00a0s" if found < 10 else f"{found:.0f}\u00a0s"
    minutes, seconds = divmod(round(found), 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours}\u00a0h\u00a0{rest:02d}\u00a0min" if hours else f"{minutes}\u00a0min\u00a0{seconds:02d}\u00a0s"


def size(value: Any) -> str:
    """Bytes in binary units."""
    found = number(value)
    if found is None or found < 0:
        return NO_VALUE
    for unit in ("B", "KiB", "MiB"):
        if found < 1024:
            return f"{found:.3g}\u00a0{unit}" if found < 1000 else f"{found:.0f}\u00a0{unit}"
        found /= 1024
    return f"{found:.2f}\u00a0GiB"


def power(value: Any) -> str:
    """A small probability as `1 × 10⁻⁵`."""
    found = number(value)
    if found is None or found <= 0:
        return NO_VALUE
    exponent = math.floor(math.log10(found) + 1e-9)
    superscript = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{found / 10.0**exponent:.3g}\u00a0×\u00a010{superscript}"


def interval(values: Record, metric: str) -> str:
    """The interval of a metric, `low–high`; empty if it is not recorded."""
    low, high = number_at(values, f"{metric}_low"), number_at(values, f"{metric}_high")
    return "" if low is None or high is None else f"{decimals(low)}–{decimals(high)}"
