"""`capsfl audit`: attacks our own rounds with canaries."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from capsfl.arguments import parse


@dataclass(frozen=True)
class AuditCommand:
    """Attack this engine's own rounds with canaries: a lower bound on epsilon against the claimed one.

    Exit code 1 when the bound refutes the claim.
    """

    noise_multiplier: float
    """z, standard deviation of the noise on the SUM over the clip norm."""
    clip_norm: float = 1.0
    """S, the L2 norm an update is clipped to."""
    sampler: Literal["all", "poisson"] = "all"
    """How a cohort is drawn."""
    cohort: int | None = None
    """m, expected canaries in a round; all when absent."""
    delta: float = 1e-5
    """Probability with which the claimed bound may fail."""
    canaries: int = 1000
    """Hospitals with a known update, each in or out by a coin; at least 1000."""
    rounds: int = 1
    """Rounds released."""
    confidence: float = 0.95
    """Of the lower bound."""
    seed: int = 0
    """Of coins, directions and noise."""
    json: bool = False
    """Print flat JSON."""


def run(words: list[str]) -> int:
    """Attacks the engine's privacy."""
    given = parse(AuditCommand, words, prog="capsfl audit")
    from capsfl.federated.canaries import AuditConfig, audit_privacy
    from capsfl.privacy.plan import PrivacyConfig

    values = asdict(given)
    chosen = {name: values.pop(name) for name in ("noise_multiplier", "clip_norm", "sampler", "cohort", "delta")}
    del values["json"]
    found = audit_privacy(PrivacyConfig(**chosen), config=AuditConfig(**values))
    if given.json:
        print(json.dumps(found))
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in found.items():
            table.add_row(name, str(value))
        Console().print(table)
    return 1 if found["verdict"] == "refuted" else 0
