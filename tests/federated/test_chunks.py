"""L is chosen by memory and time, within bounds, once; hospitals of unlike size do not wait for each other."""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfl.federated import chunks, memory
from capsfl.federated.chunks import Choice, CompiledRound, Trial, candidate_chunks, choose_chunk
from capsfl.federated.devices import CohortProgram, DevicesConfig, PlannedBytes, arrange_slots
from capsfl.federated.federation import Federation, RoundsConfig
from capsfl.federated.hospitals import stack_hospitals
from capsfl.federated.local import LocalConfig, make_local_update
from capsfl.federated.recorded import recall_chunk, record_choice
from capsfl.federated.round import CohortRecords, RoundState, Setting
from capsfl.federated.server import ServerConfig, make_server_optimizer
from capsfl.learning.tasks import Task, make_task
from capsfl.privacy.plan import PrivacyConfig, PrivacyPlan


@dataclass
class Machine:
    """A machine of which everything is known: seconds of a hospital's batch by L, bytes, seconds to compile."""

    second: dict[int, float]
    compile_s: float = 1.0
    bytes_each: int = 100
    now: float = 0.0
    compiled: list[int] = field(default_factory=list)

    def prepare(self, chunk: int) -> "Ready":
        self.compiled.append(chunk)
        self.now += self.compile_s
        return Ready(self, Trial(chunk, 50 + self.bytes_each * chunk, self.compile_s))


@dataclass
class Ready:
    machine: Machine
    trial: Trial

    def run(self) -> int:
        self.machine.now += 4 * self.machine.second[self.trial.chunk]
        return self.trial.chunk

    def run_short(self) -> int:
        self.machine.now += self.machine.second[self.trial.chunk]
        return -1


@dataclass
class Device:
    platform: str = "cpu"
    bytes_limit: int = 10**9

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.bytes_limit + 7, "bytes_in_use": 7}


def choose(machine: Machine, monkeypatch, *, device: Device | None = None, rounds: int = 1000) -> tuple[Any, Choice]:
    device = device or Device()
    monkeypatch.setattr(chunks.time, "perf_counter", lambda: machine.now)
    if device.platform == "cpu":
        monkeypatch.setattr(chunks, "free_memory_bytes", lambda _: device.bytes_limit)
    best, outcome, choice = choose_chunk(
        machine.prepare, [device], num_slots=max(machine.second), memory_fraction=1.0, rounds=rounds, batches=4.0
    )
    assert outcome == best.trial.chunk == choice.chunk, "the round returned is that of the chosen L"
    assert [trial.chunk for trial in choice.trials] == machine.compiled
    return best, choice


def test_on_a_cpu_it_goes_up_while_the_next_is_faster_and_compiles_no_more(monkeypatch):
    machine = Machine({1: 2.0, 2: 1.5, 4: 1.0, 8: 1.2, 16: 0.1})
    _, choice = choose(machine, monkeypatch)
    assert choice.chunk == 4
    assert machine.compiled == [1, 2, 4, 8]
    assert choice.reason == "measured: 8 at once are slower"
    assert [trial.short_round_s for trial in choice.trials] == pytest.approx([2.0, 1.5, 1.0, 1.2])


def test_on_an_accelerator_it_starts_from_all_and_goes_down(monkeypatch):
    machine = Machine({1: 9.0, 2: 5.0, 4: 1.1, 8: 1.0, 16: 1.3})
    _, choice = choose(machine, monkeypatch, device=Device("gpu"))
    assert (choice.chunk, machine.compiled) == (8, [16, 8, 4])


def test_small_gains_add_up_and_without_a_gain_nothing_changes(monkeypatch):
    machine = Machine({1: 1.00, 2: 0.98, 4: 0.94, 8: 0.88, 16: 0.99})
    assert choose(machine, monkeypatch)[1].chunk == 8
    machine = Machine({1: 1.00, 2: 0.98, 4: 1.02})
    _, choice = choose(machine, monkeypatch)
    assert (choice.chunk, machine.compiled) == (1, [1, 2, 4])


def test_what_does_not_fit_is_not_run_and_what_cannot_fit_is_not_compiled(monkeypatch):
    machine = Machine(dict.fromkeys((1, 2, 4, 8, 16, 32, 64, 128), 1.0))
    _, choice = choose(machine, monkeypatch, device=Device("gpu", 1000))
    assert machine.compiled[:3] == [128, 64, 8], "two sizes tell that 8 hospitals fit and 16 do not"
    assert choice.chunk == 8
    machine = Machine({1: 2.0, 2: 1.5, 4: 1.0})
    _, choice = choose(machine, monkeypatch, device=Device(bytes_limit=300))
    assert (choice.chunk, machine.compiled) == (2, [1, 2, 4])
    assert choice.reason == "measured: 4 at once do not fit the memory"


def test_few_short_rounds_are_not_worth_another_compilation(monkeypatch):
    machine = Machine({1: 2.0, 2: 0.1}, compile_s=3.0)
    _, choice = choose(machine, monkeypatch, rounds=10)
    assert (choice.chunk, machine.compiled) == (1, [1])
    assert choice.reason.startswith("the rule of the platform: in so few and short rounds")
    machine = Machine({1: 2.0, 2: 0.1}, compile_s=3.0)
    _, choice = choose(machine, monkeypatch, rounds=100)
    assert choice.chunk == 2
    # 8 s a round, 100 rounds: looking may cost 80 s.
    assert machine.now - 4 * 2.0 - 4 * 0.1 <= 80 + 3.0


@given(st.integers(1, 3000))
def test_candidates_are_few_and_waste_few_slots(share):
    sizes = candidate_chunks(share)
    assert sizes[0] == 1
    assert sizes[-1] == share
    assert len(sizes) <= share.bit_length() + 1
    for size in sizes:
        count = -(-share // size)
        assert count * (size - 1) < share, "with one hospital less at once there would be more chunks"
    assert candidate_chunks(100) == (1, 2, 4, 8, 15, 25, 50, 100)


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 8))
def test_a_cohort_is_laid_out_whole_by_size_and_evenly_over_devices(counts, devices, chunk):
    share = -(-len(counts) // devices)
    share = -(-share // chunk) * chunk
    order = arrange_slots(np.array(counts), share=share, devices=devices, chunk=chunk)
    assert sorted(order.tolist()) == [*range(len(counts)), *[len(counts)] * (share * devices - len(counts))]
    sizes = np.array([*counts, 0])[order].reshape(devices, -1, chunk)
    steps = sizes.max(-1)
    # What a chunk's smaller hospitals wait is paid back by the next chunk: all together less than one chunk's.
    assert (steps.sum() * chunk - sum(counts)) <= chunk * max(counts)
    # No device waits for another longer than the largest chunk takes.
    assert np.ptp(steps.sum(1)) <= max(counts)


COUNTS = (1, 8, 1, 7, 2, 8, 3)


def counted_steps(chunk: int, sampler: str = "all") -> int:
    """Local steps that a round executes, those of hospitals that only wait for others included."""
    calls: list[int] = []

    def loss(parameters: Any, batch: Any) -> jax.Array:
        jax.debug.callback(lambda x: calls.append(x.size), batch["x"][0])
        return jnp.mean(parameters["w"] * batch["x"])

    task = Task("count", loss, lambda *_: {}, {"w": np.zeros((), np.float32)}, lambda _: None)  # pyright: ignore
    records = {f"h{i}": {"x": np.ones(n, np.float32)} for i, n in enumerate(COUNTS)}
    federation = Federation(
        task,
        stack_hospitals(records),
        config=RoundsConfig(local=LocalConfig(optimizer="sgd", batch_size=1, shuffle=False)),
        privacy=PrivacyConfig(clip_norm=1.0),
        devices=DevicesConfig(chunk=chunk),
    )
    _, report = federation.step(federation.init())
    assert len(report.cohort) == len(COUNTS)
    jax.effects_barrier()
    return sum(calls)


@pytest.mark.parametrize(("chunk", "steps"), [(1, 30), (2, 2 * (8 + 7 + 2 + 1)), (4, 4 * (8 + 2))])
def test_a_small_hospital_does_not_execute_the_steps_of_the_largest(chunk, steps):
    assert sum(COUNTS) == 30
    assert counted_steps(chunk) == steps


def test_the_choice_is_recorded_once_and_a_resumed_run_has_it(tmp_path):
    asked = DevicesConfig()
    assert recall_chunk(tmp_path, "segmentation", asked) == asked
    record_choice(tmp_path, "segmentation", None)
    assert not list(tmp_path.iterdir())
    record_choice(tmp_path, "segmentation", Choice(4, "measured: the fastest", (Trial(4, 10, 1.0, 0.5),)))
    record_choice(tmp_path, "segmentation", Choice(2, "later"))
    record_choice(tmp_path, "classification", Choice(8, "given"))
    assert recall_chunk(tmp_path, "segmentation", asked).chunk == 4
    assert recall_chunk(tmp_path, "classification", asked).chunk == 8
    assert recall_chunk(tmp_path, "segmentation", DevicesConfig(chunk=3)).chunk == 3
    (tmp_path / "chunks.json").write_text('{"segmentation": {"chunk": 0}}')
    with pytest.raises(ValueError, match=r"chunks\.json: unreadable; delete it"):
        recall_chunk(tmp_path, "segmentation", asked)


def test_a_run_that_is_resumed_or_has_nobody_to_train_does_not_choose(task, records):
    def federation() -> Federation:
        return Federation(
            task,
            stack_hospitals(records),
            config=RoundsConfig(rounds=3, local=LocalConfig(batch_size=8)),
            privacy=PrivacyConfig(clip_norm=1.0),
        )

    first = federation()
    assert first.choice is None
    state, _ = first.step(first.init())
    assert first.choice is not None
    assert first.choice.chunk == 1
    assert first.choice.trials[0].peak_bytes > 4 * 5 * 40 * 5, "the records of five hospitals are among the arguments"
    resumed = federation()
    resumed.step(resumed.place(jax.tree.map(np.asarray, state)))
    assert resumed.choice == Choice(1, "nothing to measure in the first round: the rule of the platform")


def test_a_measured_size_gives_the_bits_of_the_same_size_given(task, records, monkeypatch):
    def race(one: CompiledRound, other: CompiledRound) -> tuple[float, float]:
        jax.block_until_ready((one.run_short(), other.run_short()))
        return (2.0, 1.0) if other.trial.chunk == 2 else (1.0, 1.0)

    monkeypatch.setattr(chunks, "TRIAL_SHARE", 1e9)
    monkeypatch.setattr(chunks, "race", race)

    def run(devices: DevicesConfig) -> tuple[Federation, Any]:
        federation = Federation(
            task,
            stack_hospitals(records),
            config=RoundsConfig(rounds=2, local=LocalConfig(batch_size=8)),
            privacy=PrivacyConfig(sampler="fixed", cohort=4, clip_norm=1.0, noise_multiplier=0.5),
            devices=devices,
        )
        state = federation.init()
        for _ in range(2):
            state, _ = federation.step(state)
        return federation, state

    measured, one = run(DevicesConfig())
    assert measured.choice is not None
    assert [trial.chunk for trial in measured.choice.trials] == [1, 2, 4]
    assert measured.choice.chunk == 2
    given, other = run(DevicesConfig(chunk=2))
    assert given.choice == Choice(2, "given")
    for leaf, same in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(same).tobytes()


def test_temporaries_grow_with_the_chunk_and_not_with_the_cohort():
    class Wide(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layer = nnx.Linear(256, 256, rngs=rngs)

    task = make_task("wide", Wide(nnx.Rngs(0)), lambda model, batch: jnp.mean(model.layer(batch["x"]) ** 2))

    def planned(cohort: int, chunk: int) -> PlannedBytes:
        plan = PrivacyPlan.build(PrivacyConfig(clip_norm=1.0), num_hospitals=cohort)
        server = functools.partial(make_server_optimizer, ServerConfig())
        local = make_local_update(task, LocalConfig(optimizer="sgd", batch_size=8))
        program = CohortProgram(local, server, plan, config=DevicesConfig(chunk=chunk))
        state = RoundState(task.parameters, server(1.0).init(task.parameters), jnp.int32(0))
        numbers: Any = jax.ShapeDtypeStruct((cohort,), jnp.int32)
        records = {"x": jax.ShapeDtypeStruct((cohort, 8, 256), jnp.float32)}
        scalars = Setting(*[jnp.float32(1)] * 4)
        return program.compile(state, CohortRecords(records, numbers, numbers), scalars, jax.random.key(0))

    few, many, more = planned(8, 2), planned(64, 2), planned(64, 8)
    assert many.arguments - few.arguments == 56 * (8 * 256 + 2) * 4, "the cohort's own records"
    assert 0 < many.temporaries <= 1.1 * few.temporaries
    weights = 4 * 256 * 257
    assert more.temporaries > many.temporaries + 6 * weights, "six hospitals more at once, each with its own weights"


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:      4 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    assert memory.free_memory_bytes(Device()) == 4096
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert memory.free_memory_bytes(Device()) == 4096
    (tmp_path / "memory.max").write_text("2000\n")
    assert memory.free_memory_bytes(Device()) == 1300
    assert memory.free_memory_bytes(Device("gpu", 55)) == 55
