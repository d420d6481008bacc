"""Checkpoints: bit-exact, atomic, readable without the model, and named when they are damaged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from capsfl.checkpoint import (
    CheckpointError,
    Checkpoints,
    Step,
    latest_parameters,
    open_checkpoints,
    read_parameters,
    read_step,
    tensor_leaves,
)
from capsfl.federated.round import RoundState
from capsfl.ledger.records import RoundRecord, parameters_root, tensor_leaf

OPTIMIZER = optax.adam(0.1)
KEY = jax.random.key(5)


def state_after(steps: int, *, seed: int = 0) -> RoundState:
    """A small model after some steps of its server optimizer."""
    _, parameters = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(seed)))
    server = OPTIMIZER.init(parameters)
    for step in range(steps):
        gradient = jax.tree.map(lambda leaf, step=step: jnp.sin(leaf + step), parameters)
        updates, server = OPTIMIZER.update(gradient, server, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return RoundState(parameters, server, jnp.int32(steps))


def same(a: object, b: object) -> bool:
    """Whether two pytrees agree in structure and in every bit."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype for x, y in leaves
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds on disk; read them, never change them."""
    folder = tmp_path_factory.mktemp("checkpoints") / "segmentation"
    with open_checkpoints(folder) as checkpoints:
        for step in (1, 2, 3):
            accountant, ledger = {"epsilon": step / 7}, bytes(range(step))
            checkpoints.save(Step.of(state_after(step), key=KEY, accountant=accountant, ledger=ledger))
    return folder


@pytest.mark.parametrize("number", [None, 1, 2])
def test_a_round_comes_back_bit_for_bit_with_optimizer_accountant_and_ledger(saved: Path, number: int | None):
    with open_checkpoints(saved) as checkpoints:
        restored = checkpoints.restore(state_after(0, seed=9), key=KEY, round_number=number)
    step = number or 3
    assert restored is not None
    assert same(restored.state, state_after(step))
    assert restored.accountant == {"epsilon": step / 7}
    assert restored.ledger == bytes(range(step))


def test_a_round_drawn_from_another_seed_is_refused(saved: Path):
    with open_checkpoints(saved) as checkpoints, pytest.raises(CheckpointError, match="3: drawn from another seed"):
        checkpoints.restore(state_after(0), key=jax.random.key(6))


def test_the_next_step_from_a_restored_state_is_the_one_not_interrupted(saved: Path):
    with open_checkpoints(saved) as checkpoints:
        restored = checkpoints.restore(state_after(0), key=KEY, round_number=2)
    assert restored is not None
    gradient = jax.tree.map(lambda leaf: jnp.sin(leaf + 2), restored.state.parameters)
    updates, _ = OPTIMIZER.update(gradient, restored.state.server, restored.state.parameters)
    assert same(optax.apply_updates(restored.state.parameters, updates), state_after(3).parameters)


def test_weights_are_read_without_the_model(saved: Path):
    arrays = read_parameters(saved, 2)
    assert arrays is not None
    assert {name: array.shape for name, array in arrays.items()} == {"bias": (2,), "kernel": (3, 2)}
    assert tensor_leaves(arrays) == tensor_leaves(state_after(2).parameters)
    assert read_parameters(saved, 4) is None


def test_all_of_a_round_is_read_without_the_model_and_has_the_digest_it_was_saved_with(saved: Path):
    wanted = Step.of(state_after(2), key=KEY, accountant={"epsilon": 2 / 7}, ledger=bytes(range(2)))
    found = read_step(saved, 2)
    assert found.digests == wanted.digests
    assert found.digest == wanted.digest
    with open_checkpoints(saved) as checkpoints:
        restored = checkpoints.restore(state_after(0), key=KEY, round_number=2)
    assert restored is not None
    assert restored.digest == wanted.digest
    others = [
        Step.of(state_after(2), key=jax.random.key(6), accountant=wanted.accountant, ledger=bytes(range(2))),
        Step.of(state_after(2), key=KEY, accountant={"epsilon": 0.1}, ledger=bytes(range(2))),
        Step.of(state_after(2), key=KEY, accountant=wanted.accountant, ledger=bytes(range(3))),
        Step.of(state_after(2)._replace(server=()), key=KEY, accountant=wanted.accountant, ledger=bytes(range(2))),
    ]
    assert len({wanted.digest, *(step.digest for step in others)}) == 5
    with pytest.raises(CheckpointError, match="4: checkpoint unreadable"):
        read_step(saved, 4)


def record_of(number: int, parameters: object) -> RoundRecord:
    """What the ledger keeps of a round."""
    leaves = tensor_leaves(parameters)
    return RoundRecord(
        round=number,
        task="segmentation",
        parameters_digest=parameters_root(leaves),
        leaves=tuple(sorted(leaves.items())),
        cohort=(),
        sampler="all",
        clip_norm="1.0",
        noise_multiplier=None,
        expected_cohort="1.0",
        epsilon=None,
        delta=None,
        configuration_hash="0c" * 32,
        code_version="0.1.0",
    )


def test_the_last_weights_are_used_only_when_the_ledger_vouches_for_them(saved: Path):
    like = state_after(0).parameters
    records = [record_of(step, state_after(step).parameters) for step in (1, 2, 3)]
    assert same(latest_parameters(saved, like, records), state_after(3).parameters)
    with pytest.raises(CheckpointError, match="3: bias is not what the ledger recorded"):
        latest_parameters(saved, like, records[:2])
    other = jax.tree.map(lambda leaf: leaf.at[..., 0].add(leaf.ndim - 1.0), state_after(3).parameters)
    with pytest.raises(CheckpointError, match="3: kernel is not what the ledger recorded"):
        latest_parameters(saved, like, [*records[:2], record_of(3, other)])


def test_a_digest_is_over_path_type_shape_and_little_endian_bytes():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = {"w": tensor_leaf("w", "float32", (2, 3), array.astype("<f4").tobytes()).hex()}
    assert tensor_leaves({"w": jnp.asarray(array)}) == expected
    assert tensor_leaves({"w": array.astype(">f4")}) == expected
    assert tensor_leaves({"w": np.asfortranarray(array)}) == expected
    changed = [
        {"v": array},
        {"w": array.T},
        {"w": array.astype(np.float64)},
        {"w": array.reshape(3, 2)},
        {"w": np.nextafter(array, 9, dtype=np.float32)},
    ]
    digests = [tuple(tensor_leaves(tree).values()) for tree in [{"w": array}, *changed]]
    assert len(set(digests)) == len(digests)


def test_only_the_newest_rounds_are_kept_when_asked(tmp_path: Path):
    with open_checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(Step.of(state_after(step), key=KEY, accountant={}, ledger=b"x"))
        assert checkpoints.rounds() == [2, 3]


def test_a_fresh_folder_has_nothing_to_restore(tmp_path: Path):
    with open_checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.rounds() == []
        assert checkpoints.restore(state_after(0), key=KEY) is None
    with pytest.raises(CheckpointError, match="no checkpoint; let `capsfl train` finish first"):
        latest_parameters(tmp_path / "c", state_after(0).parameters, [])


def test_an_interrupted_save_is_never_the_latest(saved: Path, tmp_path: Path):
    folder = Path(shutil.copytree(saved, tmp_path / "c"))
    (folder / "3").rename(folder / "3.orbax-checkpoint-tmp")
    with open_checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(state_after(0), key=KEY)
    assert restored is not None
    assert int(restored.state.round) == 2
    assert not list(folder.glob("*tmp*"))


READ = """
import json, sys
from pathlib import Path
from capsfl.checkpoint import CheckpointError, read_parameters, tensor_leaves
for folder in sys.argv[1:]:
    try:
        print(json.dumps(tensor_leaves(read_parameters(Path(folder), 3))))
    except CheckpointError as error:
        print(json.dumps(str(error)))
"""


def test_whatever_file_of_a_round_is_damaged_the_reader_tells_or_the_weights_are_whole(saved: Path, tmp_path: Path):
    """Each file is cut, emptied and changed in one bit, and read in another process, for the echo of failed reads."""
    expected = tensor_leaves(state_after(3).parameters)
    cases: dict[Path, tuple[str, str]] = {}
    for file in [p for p in (saved / "3" / "state").rglob("*") if p.is_file() and p.stat().st_size]:
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 16
        for name, damaged in (("cut", content[: len(content) // 2]), ("empty", b""), ("bit", bytes(flipped))):
            folder = Path(shutil.copytree(saved, tmp_path / str(len(cases))))
            (folder / file.relative_to(saved)).write_bytes(damaged)
            cases[folder] = (str(file.relative_to(saved / "3" / "state")), name)
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, cases)], capture_output=True, text=True, timeout=300, check=True
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    told = set()
    for (folder, case), answer in zip(cases.items(), answers, strict=True):
        if isinstance(answer, str):
            assert answer.startswith(f"{folder / '3'}: checkpoint unreadable: ")
            assert len(answer.splitlines()) == 1
        if answer != expected:
            told.add(case)
    # Small arrays lie in the merged index, state/d; what a process wrote before the merge is not read again.
    index = {case for case in cases.values() if case[0].startswith("d/") and case[1] != "bit"}
    assert index
    assert index <= told
    assert {("_METADATA", "empty"), ("manifest.ocdbt", "cut"), ("manifest.ocdbt", "empty")} <= told


def test_a_damaged_round_names_itself_and_how_to_go_on(saved: Path, tmp_path: Path):
    folder = Path(shutil.copytree(saved, tmp_path / "c"))
    shutil.rmtree(folder / "3" / "state")
    with open_checkpoints(folder) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(state_after(0), key=KEY)
    assert str(error.value).startswith(f"{folder / '3'}: checkpoint unreadable: ")
    assert "delete this folder to resume from the round before it" in str(error.value)
    shutil.rmtree(folder / "3")
    with open_checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(state_after(0), key=KEY)
    assert restored is not None
    assert same(restored.state, state_after(2))


def test_a_round_of_another_model_or_optimizer_is_named_by_what_differs(saved: Path):
    _, wider = nnx.split(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    message = r"3: made by another configuration: parameters\.kernel is \(3, 2\) there and \(4, 2\) here"
    with open_checkpoints(saved) as checkpoints:
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(RoundState(wider, OPTIMIZER.init(wider), jnp.int32(0)), key=KEY)
        same_model = state_after(0).parameters
        with pytest.raises(CheckpointError, match=r"configuration: server\.0\.count is \(\) there and absent here"):
            checkpoints.restore(RoundState(same_model, optax.sgd(0.1).init(same_model), jnp.int32(0)), key=KEY)


WRITE_ON_THREE = """
import json, sys
from pathlib import Path
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
from capsfl.checkpoint import Step, open_checkpoints
from capsfl.federated.round import RoundState
everywhere = NamedSharding(Mesh(np.asarray(jax.devices()), ("x",)), PartitionSpec())
state = jax.device_put(RoundState({"w": np.arange(6, dtype=np.float32).reshape(3, 2)}, (), np.int32(1)), everywhere)
assert len(state.parameters["w"].sharding.device_set) == 3
with open_checkpoints(Path(sys.argv[1])) as checkpoints:
    checkpoints.save(Step.of(state, key=jax.random.key(5), accountant={}, ledger=b"x"))
"""


def test_what_several_devices_have_written_one_device_reads_and_resumes(tmp_path: Path):
    subprocess.run(
        [sys.executable, "-c", WRITE_ON_THREE, tmp_path / "c"], check=True, timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
    )  # fmt: skip
    weights = {"w": np.arange(6, dtype=np.float32).reshape(3, 2)}
    found = read_parameters(tmp_path / "c", 1)
    assert found is not None
    assert tensor_leaves(found) == tensor_leaves(weights)
    like = RoundState({"w": jnp.zeros((3, 2))}, (), jnp.int32(0))
    with open_checkpoints(tmp_path / "c") as checkpoints:
        restored = checkpoints.restore(like, key=KEY)
    assert restored is not None
    assert same(restored.state.parameters, {"w": jnp.asarray(weights["w"])})


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.*choose a writable `out`"):
        Checkpoints(tmp_path / "file" / "c")


def test_a_bit_that_changes_in_anything_but_the_weights_is_named_too(saved: Path, tmp_path: Path):
    """No record in the ledger vouches for the optimizer's state, and the store has no checksum on its values."""
    folder = Path(shutil.copytree(saved, tmp_path / "c"))
    with ocp.StandardCheckpointer() as files:
        tree = files.restore(folder / "3" / "state")
        moment = np.array(tree["server"]["0.mu.kernel"])
        moment.view(np.uint8).flat[5] ^= 1
        tree["server"]["0.mu.kernel"] = moment
        shutil.rmtree(folder / "3" / "state")
        files.save(folder / "3" / "state", tree)
    with open_checkpoints(folder) as checkpoints:
        with pytest.raises(CheckpointError, match=r"3: server\.0\.mu\.kernel is not what was saved; delete this"):
            checkpoints.restore(state_after(0), key=KEY)
        restored = checkpoints.restore(state_after(0), key=KEY, round_number=2)
    assert restored is not None
    assert same(restored.state, state_after(2))
