"""What a run owns from its first start on: its ledger with everybody's keys, and the secret of its noise."""

from capsfl.consensus import rules_of
from capsfl.ledger.chain import Ledger
from capsfl.ledger.keyfiles import open_key
from capsfl.ledger.keys import chain_binding
from capsfl.ledger.statements import Registration
from capsfl.membership import record_members
from capsfl.privacy.secret import open_secret
from capsfl.recording import HospitalKeys
from capsfl.study import Split
from capsfl.training.run import Run


def open_ledger(run: Run, split: Split) -> Ledger:
    """Opens the run's ledger, or founds it: an owner's key, a key per holder of records, their registrations."""
    place, keys = run.folder / "ledger", run.folder / "keys"
    owner = open_key(keys / "owner.pem")

    def register(holder: str) -> Registration:
        signer = open_key(keys / f"holder-{holder}.pem")
        count = sum(holder in ("pooled", patient.hospital) for patient in split.train)
        return Registration.of(signer, holder, "lung CT", count, chain_binding(run.chain_id, owner.public_key))

    consensus = run.config.consensus
    approvers = tuple if consensus is None else HospitalKeys(keys, open_key).approvers
    if not Ledger.exists(place):
        registrations = [register(holder) for holder in run.holders]
        rules = None if consensus is None else rules_of(consensus, run.config.stages)
        ledger = Ledger.create(place, signer=owner, chain_id=run.chain_id, registrations=registrations, rules=rules)
        ledger.approvers = approvers
        return ledger
    ledger = Ledger.open(place, signer=owner)
    ledger.approvers = approvers
    try:
        if run.places:
            record_members(ledger, run.hospitals, register, run.folder / "checkpoints")
    except BaseException:
        ledger.close()
        raise
    return ledger


def open_run_secret(run: Run) -> bytes | None:
    """Returns the secret that the run's noise is drawn from, made on its first start; None where that is the seed."""
    if run.config.privacy.noise_key == "seed":
        return None
    begun = any(step.name.isdigit() for step in (run.folder / "checkpoints").glob("*/*"))
    return open_secret(run.folder / "keys" / "noise.secret", begun=begun)
