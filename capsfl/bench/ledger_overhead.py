"""What a ledger costs a training: rounds with and without the digests, signatures and writes of their records."""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import jax
import optax
from flax import nnx

from capsfl.bench import round_peers
from capsfl.bench.round_problems import Problem, segcaps_problem
from capsfl.digests import tensor_leaves
from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federation import Federation, RoundReport, RoundsConfig
from capsfl.federated.hospitals import stack_hospitals
from capsfl.federated.local import LocalConfig
from capsfl.federated.round import RoundState
from capsfl.learning.tasks import make_task
from capsfl.ledger.chain import Ledger
from capsfl.ledger.consensus import ConsensusRules
from capsfl.ledger.keyfiles import load_key, save_key
from capsfl.ledger.keys import Signer, chain_binding
from capsfl.ledger.records import RoundRecord, parameters_root
from capsfl.ledger.statements import Registration
from capsfl.privacy.plan import PrivacyConfig
from capsfl.recording import HospitalKeys, append_round, one_behind

HOSPITALS = 8


def measure_overhead(*, quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Times rounds of SegCaps over eight hospitals, decided by the owner and by the members.

    A quick run takes dense layers of as many weights, which compile at once, and whose rounds are far too short for the
    overhead to mean anything.

    Returns:
        A row per way to decide: wall seconds of a round alone, with its record made beside the next round, and of the
        record by itself with its processor seconds. `overhead` compares the first two, round by round in turns, with
        quartiles; `cpu_share` is what the record takes of the processor seconds of a round, which a busy machine
        changes less.
    """
    problem = _dense_problem() if quick else segcaps_problem(width=1.0)
    rounds = 2 if quick else 25
    config = RoundsConfig(local=problem.local, rounds=1000)
    rows = []
    for decided in ("owner", "members"):
        federation = Federation(
            problem.task, problem.hospitals, config=config, privacy=PrivacyConfig(clip_norm=1.0),
            devices=DevicesConfig(chunk=1), keep_updates=decided == "members",
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as place, one_behind() as behind:
            ledger, keys = _found(Path(place), problem.hospitals.names, members=decided == "members")
            state, report = federation.step(federation.init())
            alone, recorded, records, computing = [], [], [], []

            def record(
                state: RoundState, report: RoundReport, ledger: Ledger = ledger, keys: Any = keys, to: list = records
            ) -> None:
                start = time.perf_counter(), time.thread_time()
                append_round(ledger, _record(state, report), report, keys, ballots=False)
                ledger.export()
                to.append((time.perf_counter() - start[0], time.thread_time() - start[1]))

            record(state, report)
            records.clear()
            for _ in range(rounds):
                for times, with_record in ((alone, False), (recorded, True)):
                    # The record of the round before is made while this one computes.
                    start, cpu, before = time.perf_counter(), time.process_time(), (state, report)
                    if with_record:
                        behind(record, *before)
                    state, report = federation.step(state)
                    if with_record:
                        behind(lambda: None)
                    times.append(time.perf_counter() - start)
                    if not with_record:
                        computing.append(time.process_time() - cpu)
            behind(lambda: None)
            ledger.close()
        grown = [after / before - 1 for before, after in zip(alone, recorded, strict=True)]
        low, _, high = quantiles(grown, n=4, method="inclusive")
        round_cpu_s, record_cpu_s = median(computing), median(cpu for _, cpu in records)
        rows.append(
            {
                "decided": decided,
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(problem.task.parameters)),
                "rounds": rounds,
                "round_wall_s": median(alone),
                "recorded_round_wall_s": median(recorded),
                "round_cpu_s": round_cpu_s,
                "overhead": median(grown),
                "overhead_quartiles": [low, high],
                "record_wall_s": median(wall for wall, _ in records),
                "record_cpu_s": record_cpu_s,
                "cpu_share": record_cpu_s / round_cpu_s,
            }
        )
        say(f"ledger beside a round, decided by {decided}")
    return rows


class _Dense(nnx.Module):
    """Dense layers of 1.4 million weights."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(784, 1792, rngs=rngs), nnx.Linear(1792, 10, rngs=rngs)])

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps `(batch, 28, 28, 1)` to logits `(batch, 10)`."""
        return self.layers[1](nnx.relu(self.layers[0](images.reshape(images.shape[0], -1))))


def _dense_problem() -> Problem:
    images, labels = round_peers.draw_records()

    def loss(network: _Dense, batch: Mapping[str, jax.Array]) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(network(batch["image"]), batch["label"]).mean()

    records = {f"hospital {h}": {"image": images[h], "label": labels[h]} for h in range(HOSPITALS)}
    local = LocalConfig(optimizer="sgd", learning_rate=0.1, batch_size=round_peers.BATCH)
    return Problem(make_task("rounds", _Dense(), loss), stack_hospitals(records), local)


def _found(place: Path, names: tuple[str, ...], *, members: bool) -> tuple[Ledger, HospitalKeys | None]:
    owner, keys = Signer((7).to_bytes(32, "big")), place / "keys"
    keys.mkdir()
    binding, joined = chain_binding("bench", owner.public_key), []
    for number, name in enumerate(names):
        signer = Signer((200 + number).to_bytes(32, "big"))
        save_key(signer, keys / f"holder-{number}.pem")
        joined.append(Registration.of(signer, name, "lung CT", 8, binding))
    rules = ConsensusRules(quorum="two_thirds") if members else None
    ledger = Ledger.create(place / "ledger", signer=owner, chain_id="bench", registrations=joined, rules=rules)
    if not members:
        return ledger, None
    opened = HospitalKeys(keys, load_key)
    ledger.approvers = opened.approvers
    return ledger, opened


def _record(state: RoundState, report: RoundReport) -> RoundRecord:
    leaves = tensor_leaves(state.parameters)
    return RoundRecord(
        round=report.round,
        task="segmentation",
        parameters_digest=parameters_root(leaves),
        leaves=tuple(sorted(leaves.items())),
        cohort=report.cohort,
        sampler="all",
        clip_norm="1.0",
        noise_multiplier="0.0",
        expected_cohort="8.0",
        epsilon=None,
        delta=None,
        configuration_hash="0c" * 32,
        code_version="0.1.0",
    )
