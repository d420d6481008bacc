"""Every check of the ledger, broken on purpose, and the test that must then fail.

`python tests/ledger/mutations.py` writes the table of README.md from this list.
"""

# ruff: noqa: E501 (one mutation a line reads as the table it becomes)
from pathlib import Path
from typing import NamedTuple


class Mutation(NamedTuple):
    """One check, taken out.

    Attributes:
        promise: what the check keeps.
        module: file in `capsfl/ledger`.
        old: its text, which stands there exactly once.
        new: what takes its place.
        test: file and test that notices.
    """

    promise: str
    module: str
    old: str
    new: str
    test: str


CANONICAL, CHAIN, KEYS, MERKLE = (f"test_ledger_{name}.py::test_" for name in ("canonical", "chain", "keys", "merkle"))
RECORDS, VERIFY, CONSENSUS, SHARING = (
    f"test_ledger_{name}.py::test_" for name in ("records", "verify", "consensus", "sharing")
)
PROOFS, DIRECTORY, FAULTS, WITNESS = (
    f"test_ledger_{name}.py::test_" for name in ("proofs", "directory", "faults", "witness")
)

MUTATIONS = (
    Mutation("bytes are canonical", "canonical.py", "if encode(value) != data:", "if False:", CANONICAL + "hostile_bytes"),
    Mutation("nesting is bounded before parsing", "canonical.py", "    _check_depth(text)\n    try:", "    try:", CANONICAL + "hostile_bytes"),
    Mutation("integers stay below 2**53", "canonical.py", "if not -MAX_INTEGER <= value <= MAX_INTEGER:", "if False:", CANONICAL + "values_outside"),
    Mutation("subclasses have no bytes", "canonical.py", "    kind = type(value)\n", "    kind = next((k for k in (bool, int, str, list, dict, float) if isinstance(value, k)), type(value))\n", CANONICAL + "values_outside"),
    Mutation("floats are refused", "canonical.py", "    elif kind is float:\n        raise CanonicalError", "    elif kind is float:\n        return\n        raise CanonicalError", CANONICAL + "values_outside"),
    Mutation("the upper s is refused", "keys.py", "0 < s <= ORDER // 2", "0 < s < ORDER", KEYS + "wycheproof_p1363"),
    Mutation("the chain is signed", "keys.py", ";chain={chain_id}", "", KEYS + "a_signature_holds"),
    Mutation("the type is signed", "keys.py", "vnd.capsfl.{payload_type}.v1", "vnd.capsfl.v1", KEYS + "a_signature_holds"),
    Mutation("keys are private", "keyfiles.py", "if os.fstat(file.fileno()).st_mode & 0o077:", "if False:", KEYS + "key_files_that_are"),
    Mutation("a key file is no link", "storage.py", "os.O_NOFOLLOW | os.O_NONBLOCK", "os.O_NONBLOCK", KEYS + "key_files_that_are"),
    Mutation("a key never overwrites another", "keyfiles.py", "os.link(draft, path)", "os.replace(draft, path), open(draft, 'wb').close()", KEYS + "a_saved_key"),
    Mutation("leaves and nodes differ", "merkle.py", 'sha256(b"\\x01" + left + right)', "sha256(left + right)", MERKLE + "roots_agree"),
    Mutation("an inclusion proof ends at the root", "merkle.py", "return node == root", "return True", MERKLE + "inclusion_agrees"),
    Mutation("an empty old tree confirms nothing", "merkle.py", "    if 0 < old_size == new_size:", "    if old_size == 0:\n        return not proof\n    if 0 < old_size == new_size:", MERKLE + "consistency_agrees"),
    Mutation("the old root is recomputed", "merkle.py", "return old_node == old_root and", "return", MERKLE + "a_consistency_proof_holds"),
    Mutation("a head's signature is checked", "block.py", 'return Verifier(self.public_key).verify(self.signature, "head", self.chain_id, canonical.encode(self._body()))', "return True", CHAIN + "a_block_forged"),
    Mutation("a head is read exactly", "block.py", "whole = head.encode() == data and type(head.size) is int", "whole = True", CHAIN + "heads_that_are_no_heads"),
    Mutation("a block's header is the expected one", "history.py", "if found != expected:", "if False:", CHAIN + "even_the_owner"),
    Mutation("a block is signed by the owner", "history.py", "if not head.is_signed():", "if False:", CHAIN + "a_block_forged"),
    Mutation("committed blocks are all there", "log.py", "missing = committed is not None and height < committed", "missing = False", CHAIN + "a_log_cut_below"),
    Mutation("torn is not damaged", "log.py", "lost = committed is None or height < committed", "lost = True", CHAIN + "a_torn_record"),
    Mutation("the head belongs to the log", "log.py", "history.head(head.size) == head", "True", CHAIN + "heads_that_are_no_heads"),
    Mutation("frames have a checksum", "storage.py", "if zlib.crc32(length + payload) != checksum:", "if False:", CHAIN + "every_bit_flip"),
    Mutation("one writer", "storage.py", "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", CHAIN + "two_writers"),
    Mutation("the log is replaced before the head", "storage.py", "os.replace(draft, path)", "os.rename(draft, path.with_name('lost'))", FAULTS + "a_faulty_append"),
    Mutation("records appear once", "rules.py", "if identity in index.heights:", "if False:", CONSENSUS + "every_lie"),
    Mutation("hospitals register once", "rules.py", "if alias in index.hospitals:", "if False:", CHAIN + "rounds_go_up"),
    Mutation("a cohort is registered", "rules.py", "    if member is None:\n        raise LedgerError(f\"{where}", "    if False:\n        raise LedgerError(f\"{where}", CHAIN + "rounds_go_up"),
    Mutation("rounds go up", "rules.py", "if record.round <= latest:", "if False:", CHAIN + "rounds_go_up"),
    Mutation("a cohort is who committed", "rules.py", "and committed != members.keys():", "and False:", CONSENSUS + "every_lie"),
    Mutation("ballots are decided", "rules.py", "if place in index.ballots and place not in index.decisions:", "if False:", CONSENSUS + "every_lie"),
    Mutation("statements are signed", "rules.py", "if not record.is_signed(index.keys[hospital], index.binding):", "if False:", CONSENSUS + "every_lie"),
    Mutation("commitments are countersigned", "rules.py", "if not record.is_countersigned(index.keys[record.peer], index.binding):", "if False:", CONSENSUS + "every_lie"),
    Mutation("a new key is possessed", "rules.py", "if not record.is_proven(index.binding):\n        raise LedgerError(\"rotation", "if False:\n        raise LedgerError(\"rotation", CONSENSUS + "a_rotated_key"),
    Mutation("who registers holds the key", "rules.py", "if not record.is_proven(index.binding):\n        raise LedgerError(f\"registration", "if False:\n        raise LedgerError(f\"registration", CONSENSUS + "nobody_registers"),
    Mutation("nonces are used once", "rules.py", "if (hospital, nonce) in index.nonces:", "if False:", CONSENSUS + "statements_do_not_replay"),
    Mutation("nobody scores himself", "rules.py", "if candidate == record.hospital and not index.rules.self_report:", "if False:", CONSENSUS + "every_lie"),
    Mutation("the first block is bare", "rules.py", "if height == 0 and not isinstance(record, Genesis | ConsensusRules | Registration):", "if False:", CONSENSUS + "the_first_block"),
    Mutation("a quorum has members", "rules.py", 'if index.rules.quorum != "owner" and len(index.members()) < _FEWEST_MEMBERS:', "if False:", CONSENSUS + "the_first_block"),
    Mutation("the vote closes the commitments", "rules.py", "if place in index.ballots:", "if False:", CONSENSUS + "nobody_commits"),
    Mutation("ballots are not left out", "rules.py", "if len(ballots) < needed:", "if False:", CONSENSUS + "a_leader_cannot"),
    Mutation("who votes has committed", "rules.py", "if record.hospital not in committed:", "if False:", CONSENSUS + "who_has_not_committed"),
    Mutation("no model is spared votes", "rules.py", "for other in earlier[:2]:", "for other in ():", CONSENSUS + "no_voter_spares"),
    Mutation("a third ballot tells of the first voter", "rules.py", "for other in earlier[:2]:", "for other in earlier[:1]:", CONSENSUS + "no_voter_spares"),
    Mutation("a key is one member's for ever", "rules.py", "if public_key in index.used:", "if False:", CONSENSUS + "one_key"),
    Mutation("a name binds its owner", "keys.py", "_CHAIN_DOMAIN + owner_key + chain_id.encode()", "_CHAIN_DOMAIN + chain_id.encode()", CONSENSUS + "statements_do_not_replay"),
    Mutation("nobody's patients are left out", "rules.py", "if not counted >= members.keys():", "if False:", CONSENSUS + "patients_are"),
    Mutation("nobody votes twice", "rules.py", "if any(other.hospital == record.hospital for other in earlier):\n        raise LedgerError(f\"ballot", "if False:\n        raise LedgerError(f\"ballot", CONSENSUS + "every_lie"),
    Mutation("leaders take turns", "rules.py", "if record.hospital != leader:", "if False:", CONSENSUS + "every_lie"),
    Mutation("a decision follows from its ballots", "rules.py", "if (record.errors, record.weights) != decide(index.rules, ballots, committed):", "if False:", CONSENSUS + "every_lie"),
    Mutation("the revoked sign nothing", "rules.py", "    if hospital in index.revoked:\n        raise LedgerError(f\"{where}", "    if False:\n        raise LedgerError(f\"{where}", CONSENSUS + "a_revoked_hospital"),
    Mutation("a block has its quorum", "history.py", "if len(approvers) < needed:", "if False:", CONSENSUS + "a_block_needs"),
    Mutation("approvals are the members' signatures", "history.py", "if not head.is_approved(self.index.keys[member], bytes.fromhex(signature)):", "if False:", CONSENSUS + "approvals_of_strangers"),
    Mutation("work is what the rules ask", "history.py", "if (block.work is not None) != (bits > 0) or not has_work(block.hash(), bits):", "if False:", CONSENSUS + "work_is_checked"),
    Mutation("the median counts", "consensus.py", 'median if rules.combine == "median" else mean', "mean", CONSENSUS + "poisoned_models|the_mean_can_be_moved"),
    Mutation("the worst are out-voted", "consensus.py", "[-1 - rules.byzantine])", "[-1])", CONSENSUS + "the_worst_models"),
    Mutation("liars need a crowd", "consensus.py", "if rules.byzantine and len(known) < 2 * rules.byzantine + 2:", "if False:", CONSENSUS + "the_worst_models"),
    Mutation("missing ballots are named", "verify.py", "if member not in voters]", "if False]", CONSENSUS + "missing_ballots"),
    Mutation("few votes are a warning", "verify.py", "if fewest < SAFE_MEMBERS - 1:", "if False:", CONSENSUS + "missing_ballots"),
    Mutation("only what others keep is excused", "verify.py", "self.status is Status.UNVERIFIABLE and not self.outside", "False", CONSENSUS + "what_others_keep"),
    Mutation("a grant follows the policy in force", "rules.py", "if policy is None or policy.version != record.policy_version:", "if policy is None:", SHARING + "a_grant_is_checked"),
    Mutation("a policy allows", "rules.py", "if not policy.allows(request.hospital, height):", "if False:", SHARING + "a_grant_is_checked"),
    Mutation("a policy expires", "sharing.py", "and (self.expires is None or height < self.expires)", "", SHARING + "a_grant_is_checked"),
    Mutation("a seal is bound to its purpose", "sealing.py", "canonical.encode([ephemeral.hex(), recipient.hex(), chain_id, context])", "canonical.encode([ephemeral.hex(), recipient.hex(), chain_id])", SHARING + "a_seal_opens"),
    Mutation("a tensor's bytes fit its shape", "records.py", "    require(view.nbytes == expected,", "    require(True,", RECORDS + "a_tensor_that_is_not"),
    Mutation("a tensor's name is hashed", "records.py", '"path": path, "dtype"', '"path": "", "dtype"', RECORDS + "a_tensor_leaf_changes"),
    Mutation("the root follows from the leaves", "records.py", "self.parameters_digest == root,", "True,", RECORDS + "a_round_that_says"),
    Mutation("names are no paths", "fields.py", 'and not set("/\\\\") & set(name)', "", RECORDS + "a_round_that_says"),
    Mutation("tensors are recomputed", "verify.py", "leaf = first_difference(recorded, found)", "leaf = None", VERIFY + "a_changed_tensor"),
    Mutation("epsilon is recomputed", "verify.py", "rel_tol=_EPSILON_TOLERANCE)", "rel_tol=1.0)", VERIFY + "an_understated_epsilon"),
    Mutation("the configuration is compared", "verify.py", "if record.configuration_hash != configuration_hash:", "if False:", VERIFY + "another_configuration"),
    Mutation("a manifest is the owner's", "manifests.py", "if not self.is_signed(public_key, chain_id):", "if False:", VERIFY + "a_manifest_alone"),
    Mutation("a manifest is its round's", "manifests.py", "if (self.task, self.round, self.parameters_digest) != (record.task, record.round, record.parameters_digest):", "if False:", VERIFY + "a_manifest_alone"),
    Mutation("files are compared", "verify.py", "file = first_difference(dict(manifest.files), found)", "file = None", VERIFY + "a_manifest_alone"),
    Mutation("what a checkpoint holds is compared", "verify.py", "held = recompute_contents(record) == manifest.contents", "held = True", VERIFY + "files_that_differ"),
    Mutation("another version is named", "block.py", "if found and kind != BLOCK_TYPE:", "if False:", CONSENSUS + "a_block_of_another_version"),
    Mutation("a rollback shows against a witness", "witness.py", "if not 0 < seen.size <= size:", "if False:", VERIFY + "a_rollback"),
    Mutation("a rewritten history shows against a witness", "witness.py", "if history.head(seen.size).root != seen.root:", "if False:", VERIFY + "a_rewritten_history"),
    Mutation("a witness head is signed", "witness.py", "if not head.is_signed():", "if False:", VERIFY + "a_witness_head"),
    Mutation("a cosignature is its witness's", "witness.py", "if not head.is_cosigned(public_key, signature):", "if False:", WITNESS + "a_cosigned_head"),
    Mutation("a member's approval makes no witness", "block.py", '_WITNESS_TYPE = "cosignature"', '_WITNESS_TYPE = "approval"', WITNESS + "an_approval_out_of_the_log"),
    Mutation("evidence is two stories", "witness.py", "    if not first.contradicts(second):\n        raise LedgerError(\"the heads do not contradict each other\")", "    if False:\n        raise LedgerError(\"\")", WITNESS + "two_heads"),
    Mutation("a proof's record is under its block", "proofs.py", "if not merkle.verify_inclusion(record_leaf(record), position,", "if not (lambda *_: True)(record_leaf(record), position,", PROOFS + "a_changed_proof"),
    Mutation("a proof's block is under the head", "proofs.py", "if not merkle.verify_inclusion(block_leaf,", "if not (lambda *_: True)(block_leaf,", PROOFS + "a_changed_proof"),
    Mutation("a lookup comes closer", "directory.py", "best = min(known", "best = max(known", DIRECTORY + "every_hospital_is_found"),
    Mutation("a bucket is bounded", "directory.py", "and len(bucket) < self.contacts", "", DIRECTORY + "a_table_holds"),
)  # fmt: skip


def table() -> str:
    """Returns the list as README.md shows it."""
    rows = ["| promise | module | the test that fails without the check |", "|---|---|---|"]
    for mutation in MUTATIONS:
        file, _, name = mutation.test.partition("::")
        rows.append(f"| {mutation.promise} | `{mutation.module}` | `{file}`: `{name.replace('|', '`, `')}...` |")
    return "\n".join(rows) + "\n"


README = """# Tests of the ledger

`conftest.py` builds one chain of 20 blocks that the tests copy. Known answers come from `../shared/vectors` where
they are there. `mutations.py` lists every check of the ledger with the test that notices its absence;
`test_ledger_mutations.py` takes each one out of a copy of the package and runs that test, which must fail: a few of
them under `make test`, all under `make torture`. Checks that only repeat what another one finds (a repeated key, a
frame's absurd length, spare nodes of a proof) are not in it.

"""

if __name__ == "__main__":
    Path(__file__).with_name("README.md").write_text(README + table(), encoding="utf-8")
