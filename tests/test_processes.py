"""Who takes part in a run, as launchers and users say it."""

import pytest

from capsfl.processes import (
    ProcessesConfig,
    ProcessesError,
    Rank,
    agree,
    by_first,
    find_rank,
    in_turn,
    is_first,
    joined,
)

SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "node[01-04]"}
MPI = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1"}
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "node01:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
POD = {"JOB_COMPLETION_INDEX": "1", "JAX_COORDINATOR_ADDRESS": "study-0.study:1234", "JAX_NUM_PROCESSES": "2"}


@pytest.mark.parametrize(
    ("config", "environment", "rank"),
    [
        pytest.param({}, {}, None, id="alone"),
        pytest.param({}, SLURM, Rank(None, 4, 2, "slurm"), id="slurm"),
        pytest.param({"coordinator": "a:1"}, SLURM, Rank("a:1", 4, 2, "slurm"), id="slurm, another address"),
        pytest.param({}, SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None, id="slurm, one task"),
        pytest.param({}, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None, id="slurm, the batch script"),
        pytest.param({"launcher": "none"}, SLURM, None, id="slurm, each task for itself"),
        pytest.param({}, MPI, Rank(None, 3, 1, "ompi"), id="open mpi"),
        pytest.param({"coordinator": "a:1"}, {"PMI_SIZE": "3", "PMI_RANK": "0"}, Rank("a:1", 3, 0, None), id="mpich"),
        pytest.param({}, BY_HAND, Rank("node01:1234", 2, 1, None), id="by hand"),
        pytest.param({"process_id": 0}, BY_HAND, Rank("node01:1234", 2, 0, None), id="a flag before the environment"),
        pytest.param({}, POD, Rank("study-0.study:1234", 2, 1, None), id="indexed job"),
        pytest.param({}, {"JOB_COMPLETION_INDEX": "1"}, None, id="indexed job of lone pods"),
        pytest.param({"launcher": "k8s"}, {}, Rank(None, None, None, "k8s"), id="as jax finds it in kubernetes"),
    ],
)
def test_who_takes_part_is_read_from_flags_and_launchers(config, environment, rank):
    assert find_rank(ProcessesConfig.model_validate(config), environment) == rank


@pytest.mark.parametrize(
    ("config", "environment", "message"),
    [
        ({"num_processes": 2}, {}, "devices.coordinator: missing for several processes; give --devices.coordinator or"),
        ({"coordinator": "a:1", "num_processes": 2}, {}, "devices.process_id: missing .* or JAX_PROCESS_ID"),
        ({"coordinator": "a:1", "process_id": 1}, {}, "devices.num_processes: missing .* or JAX_NUM_PROCESSES"),
        ({"process_id": 2}, BY_HAND, "devices.process_id = 2: there are 2 processes, numbered from 0"),
        ({}, BY_HAND | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES = two: expected a whole number"),
        ({}, {"PMI_SIZE": "3", "PMI_RANK": "0"}, "devices.coordinator: missing"),
        ({"launcher": "slurm"}, {}, 'devices.launcher = "slurm": SLURM_NTASKS and SLURM_PROCID are not set'),
    ],
)
def test_half_of_what_is_needed_is_refused_by_the_missing_half(config, environment, message):
    with pytest.raises(ProcessesError, match=message):
        find_rank(ProcessesConfig.model_validate(config), environment)


@pytest.mark.parametrize("address", ["node01", "node01:", ":", "a b:1"])
def test_an_address_without_host_or_port_is_refused(address: str):
    with pytest.raises(ValueError, match="coordinator"):
        ProcessesConfig(coordinator=address)


def test_alone_nothing_is_waited_for():
    with joined(ProcessesConfig(launcher="none")):
        assert is_first()
        assert by_first("a figure", lambda: 3) == 3
        assert in_turn("a file", lambda: "made") == "made"
        agree("the configuration", "same")


def test_what_processes_must_share_leaves_out_only_which_one_this_is():
    config = ProcessesConfig(coordinator="a:1", num_processes=2, process_id=1)
    assert config.shared() == config.model_copy(update={"process_id": 0}).shared()
    assert config.shared() != config.model_copy(update={"num_processes": 3}).shared()
