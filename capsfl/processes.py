"""Several processes that run one study: they start together, wait for each other, and end together.

Every process runs the same program over all devices of all of them (`jax.distributed`). What touches the run folder
is done by the first one while the others wait; a checkpoint is saved by all. A process that fails tells the others
why; one that is killed is missed by its heartbeat. Either way every process ends with one line, and the same command
in all of them resumes.
"""

import atexit
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

import jax
from jax._src import distributed  # its client, the store of keys that Orbax uses too, has no public name
from jax.experimental.multihost_utils import sync_global_devices
from pydantic import Field

from capsfl.settings import Settings

T = TypeVar("T")

FAILURE = "capsfl/failure"
LOOK_S = 0.5
"""How often a process looks whether another one has failed."""
LINGER_S = 10.0
"""How long the first process, which holds the messages, waits for the others to read its last one."""
END_S = 86_400
"""How long a process that is done waits for the others; one that is lost or fails is noticed long before."""
RESUME = "run the same command in every process again to resume"

TASKS = {
    "slurm": ("SLURM_NTASKS", "SLURM_PROCID"),
    "ompi": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpi": ("PMI_SIZE", "PMI_RANK"),
    "k8s": ("JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX"),
}
"""Where launchers say how many processes they have started, and which one this is; Kubernetes says the second only."""


class ProcessesError(ValueError):
    """Processes that cannot start together or have lost one of them; the message says what to do."""


class ProcessesConfig(Settings):
    """Which other processes take part in the run; nothing of it changes the result's identity."""

    launcher: Literal["auto", "none", "slurm", "ompi", "mpi4py", "k8s"] = "auto"
    """Who has started the processes: `auto` believes the fields below, JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, SLURM, MPI and an indexed Kubernetes job; `none` runs alone whatever those say."""
    coordinator: str | None = Field(default=None, pattern=r"^\S+:\d+$")
    """Address of the first process with a free port, `host:port`; the same in every process."""
    num_processes: int | None = Field(default=None, ge=1)
    """How many processes take part."""
    process_id: int | None = Field(default=None, ge=0)
    """Which one this is, from 0."""
    start_timeout_s: int = Field(default=300, ge=1)
    """Seconds that a process waits for the others to start."""
    heartbeat_timeout_s: int = Field(default=60, ge=5)
    """Seconds of silence after which a process counts as lost and all others end."""

    def shared(self) -> str:
        """All fields as JSON but the one in which processes may differ."""
        return self.model_dump_json(exclude={"process_id"})


@dataclass(frozen=True)
class Rank:
    """This process among all; None leaves a value to JAX's own detection by `method`."""

    coordinator: str | None
    number: int | None
    index: int | None
    method: str | None


def find_rank(config: ProcessesConfig, environment: Mapping[str, str]) -> Rank | None:
    """Reads who takes part from the configuration, else from the environment; None for a process alone.

    Raises:
        ProcessesError: a part of it is missing or contradicts the rest.
    """
    if config.launcher == "none":
        return None
    if config.launcher in ("mpi4py", "k8s"):
        return Rank(config.coordinator, config.num_processes, config.process_id, config.launcher)
    coordinator = config.coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    number = _first_known(config.num_processes, environment, "JAX_NUM_PROCESSES")
    index = _first_known(config.process_id, environment, "JAX_PROCESS_ID")
    method = None
    for launcher, (size, own) in TASKS.items():
        if config.launcher not in ("auto", launcher) or own not in environment:
            continue
        if launcher == "slurm" and "SLURM_STEP_NODELIST" not in environment:
            continue  # the batch script itself, which knows the tasks of the steps it may start
        if launcher == "k8s" and coordinator is None:
            continue  # an indexed job of pods that each do something else
        number = _first_known(number, environment, size)
        index = _first_known(index, environment, own)
        method = launcher if launcher in ("slurm", "ompi") else None
        break
    else:
        if config.launcher != "auto":
            size, own = TASKS[config.launcher]
            raise ProcessesError(f'devices.launcher = "{config.launcher}": {size} and {own} are not set; start by it')
    if number == 1 or (coordinator is None and number is None and index is None):
        return None
    missing = {"coordinator": coordinator or method, "num_processes": number, "process_id": index}
    for field, value in missing.items():
        if value is None:
            name = {"coordinator": "JAX_COORDINATOR_ADDRESS"}.get(field, f"JAX_{field.upper()}")
            flag = field.replace("_", "-")
            raise ProcessesError(f"devices.{field}: missing for several processes; give --devices.{flag} or {name}")
    assert number is not None
    assert index is not None
    if index >= number:
        raise ProcessesError(f"devices.process_id = {index}: there are {number} processes, numbered from 0")
    return Rank(coordinator, number, index, method)


@contextmanager
def joined(config: ProcessesConfig) -> Iterator[None]:
    """Joins the processes that were started together, and leaves when all are done.

    Must be entered before anything else asks JAX for a device. Alone, it does nothing. When the body fails, the
    other processes are told, and this one ends without waiting for them once its error is printed.

    Raises:
        ProcessesError: the processes do not find each other in time, or one of them is lost.
    """
    rank = find_rank(config, os.environ)
    if rank is None:
        yield
        return
    with _native_errors_named(config):
        _initialize(config, rank)
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(done,), daemon=True)
        watcher.start()
        try:
            yield
            meet()  # before this, another one may still fail
        except BaseException as error:
            done.set()
            _leave_at_exit(130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, ValueError) else 1)
            if isinstance(error, jax.errors.JaxRuntimeError):
                error = ProcessesError(f"process {process_index()}: {_cause_of(error)}; {RESUME}")
                _leave_at_exit(2)
            _tell(str(error) or type(error).__name__)
            raise error
        done.set()
        watcher.join()
        jax.distributed.shutdown()


def process_index() -> int:
    """This process's number among all, 0 for the first or only one."""
    return distributed.global_state.process_id  # `jax.process_index` would first wait for all devices to be known


def is_first() -> bool:
    """Tells whether this process is the one that writes."""
    return process_index() == 0


_turns = itertools.count()


def by_first(what: str, function: Callable[[], T]) -> T:
    """Has the first process do something while the others wait; all get its result.

    Args:
        what: names it in messages.
        function: called in the first process only; its result must be JSON.

    Raises:
        ProcessesError: the processes are not at the same point of the program.
    """
    client: Any = distributed.global_state.client
    if client is None:
        return function()
    key = f"capsfl/turn/{next(_turns)}"
    if is_first():
        result = function()
        client.key_value_set(key, json.dumps([what, result]))
        return result
    while True:
        try:
            there, result = json.loads(client.blocking_key_value_get(key, 60_000))
            break
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    if there != what:
        raise ProcessesError(f"process {process_index()}: at {what}, the first at {there}; start all by one command")
    return result


def meet() -> None:
    """Waits until all processes are here."""
    client: Any = distributed.global_state.client
    if client is not None:
        client.wait_at_barrier(f"capsfl/meet/{next(_turns)}", END_S * 1000)


def in_turn(what: str, function: Callable[[], T]) -> T:
    """Calls a function that makes a file in the first process, and then in the others, which find it."""
    made = function() if is_first() else None
    by_first(what, lambda: None)
    return function() if made is None else made


def agree(what: str, value: str) -> None:
    """Makes sure that all processes have the same value.

    Raises:
        ProcessesError: this process has another one than the first.
    """
    if by_first(what, lambda: value) != value:
        raise ProcessesError(f"process {process_index()}: {what} is not the first one's; start all by one command")


# Why joining failed, should JAX end the process while it tries; empty at all other times.
_joining: list[str] = []


def _initialize(config: ProcessesConfig, rank: Rank) -> None:
    where = rank.coordinator or f"found by {rank.method}"
    late = (
        f"devices.coordinator = {where}: process {rank.index} of {rank.number} on {socket.gethostname()} could not "
        f"join within {config.start_timeout_s} s"
    )
    remedy = "start every process, with one reachable address and free port"
    _joining.append(f"{late}; {remedy}")
    # It would keep SIGTERM from ending a process, for a program that then ends by itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            rank.coordinator,
            rank.number,
            rank.index,
            cluster_detection_method=rank.method,
            initialization_timeout=config.start_timeout_s,
            heartbeat_timeout_seconds=config.heartbeat_timeout_s,
            shutdown_timeout_seconds=config.heartbeat_timeout_s,
        )
        # All tell their devices and open their connections now, when they are at the same point of the program.
        sync_global_devices("capsfl")
    except (RuntimeError, ValueError, TypeError) as error:
        _leave_at_exit(2)
        raise ProcessesError(f"{late} ({_cause_of(error)}); {remedy}") from error
    finally:
        _joining.clear()


def _watch(done: threading.Event) -> None:
    """Ends this process when another one says that it has failed."""
    client: Any = distributed.global_state.client
    while not done.wait(LOOK_S):
        with suppress(jax.errors.JaxRuntimeError):  # nobody has failed; a lost coordinator is noticed by JAX itself
            failed, message = json.loads(client.key_value_try_get(FAILURE))
            if failed != process_index():
                _tell(message)
                _end(f"process {process_index()}: ended with process {failed}: {message}")


def _tell(message: str) -> None:
    """Says to the others that this process has failed, unless one has already; the first waits until all know."""
    client: Any = distributed.global_state.client
    with suppress(jax.errors.JaxRuntimeError):
        with suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(FAILURE, json.dumps([process_index(), message]))
        client.key_value_set(f"capsfl/knows/{process_index()}", "")
        end = time.monotonic() + LINGER_S
        while is_first() and time.monotonic() < end:
            if len(client.key_value_dir_get("capsfl/knows/")) == distributed.global_state.num_processes:
                break
            time.sleep(LOOK_S / 5)


def _first_known(given: int | None, environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if given is not None or text is None:
        return given
    if not text.isdecimal():
        raise ProcessesError(f"{name} = {text}: expected a whole number")
    return int(text)


def _cause_of(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    if "closed by peer" in text or "Connection reset" in text:
        return "another process has ended or cannot be reached (connection closed by peer)"
    return text[:200]


def _leave_at_exit(code: int) -> None:
    """Makes the interpreter end at its exit: JAX would first wait for processes that will not come."""

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)


def _end(line: str) -> NoReturn:
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
    os._exit(2)


@contextmanager
def _native_errors_named(config: ProcessesConfig) -> Iterator[None]:
    """Has JAX's way to end a process that lost another, a page of C++ on standard error and SIGABRT, say one line.

    Until the end of the body, what native code writes, such as Gloo its greetings, goes to a file that goes with it.
    """
    console, python = (os.dup(1), os.dup(2)), (sys.stdout, sys.stderr)
    with tempfile.TemporaryFile() as native:
        sys.stdout, sys.stderr = (os.fdopen(place, "w", buffering=1, closefd=False) for place in console)

        def abort(_: int) -> None:
            native.seek(0)
            text = native.read().decode(errors="replace")
            lost = f"process {process_index()}: {_lost_process(text, config)}; {RESUME}"
            os.write(console[1], f"{_joining[0] if _joining else lost}\n".encode())
            os._exit(2)

        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(abort)
        library = ctypes.CDLL(None)
        library.signal.restype, library.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
        library.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
        for place in (1, 2):
            os.dup2(native.fileno(), place)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = python
            for place in (1, 2):
                os.dup2(console[place - 1], place)
                os.close(console[place - 1])
            library.signal(signal.SIGABRT, None)  # SIG_DFL


def _lost_process(text: str, config: ProcessesConfig) -> str:
    """Which process was lost, from what JAX's coordination service writes before it aborts."""
    silent = re.search(r"stopped sending heartbeats\):\n(.*?)\nThe tasks", text, re.DOTALL)
    if silent:
        return f"no sign of process {', '.join(silent[1].split())} for {config.heartbeat_timeout_s} s"
    if "Failed to send RPC to coordination service" in text:
        return "the first process has ended or cannot be reached"
    fatal = re.search(r"^F\d+ .*?\] (.*)", text, re.MULTILINE)
    return fatal[1][:200] if fatal else "aborted"
