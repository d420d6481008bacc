"""The chain of a ledger on the page: the log that the page carries, and the script that checks the page against it.

Page and log come from one folder, and whoever can change one can change the other and the script with them. The check
so shows that what is drawn is what the owner signed, in a page that somebody handed on; that it is the right owner, and
the latest of his stories, shows against a head kept elsewhere (`capsfl verify --witness`).
"""

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from capsfl.report.study import Record, number_at, rows_at, text

MAX_LOG_BYTES = 2 << 20
MAX_VOTERS = 16


def script() -> Markup:
    """Returns the script, as it stands between its tags."""
    return Markup(files("capsfl.report").joinpath("chain.js").read_text(encoding="utf-8"))


def script_source() -> str:
    """Returns what a Content-Security-Policy allows so that this script runs, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()}'"


def carried_log(folder: Path) -> str:
    """Returns a run's log in base64; nothing where there is none, or more than a page should carry."""
    path = folder / "ledger" / "log"
    if not path.is_file() or path.stat().st_size > MAX_LOG_BYTES:
        return ""
    return base64.b64encode(path.read_bytes()).decode()


def votes_of(row: Record) -> list[dict[str, Any]]:
    """What a round's decision says of each hospital: its name, and its share in per cent, None if it was out-voted."""
    votes: list[Mapping[str, Any]] = rows_at(row, "votes")
    shares = [(text(vote.get("hospital")), number_at(vote, "weight")) for vote in votes]
    return [{"hospital": name, "share": None if share is None else f"{100 * share:.1f}"} for name, share in shares]
