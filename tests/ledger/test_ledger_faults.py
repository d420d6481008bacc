"""Every system call of every write fails once: afterwards the ledger is the old one or the new one."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest

from capsfl.ledger import Ledger, StorageError, save_key
from capsfl.ledger.errors import LedgerError

_CALLS = ("open", "write", "fsync", "ftruncate", "lseek", "unlink", "replace")
_TORTURE = os.environ.get("CAPSFL_TORTURE") == "1"


class _PowerCut(BaseException):
    """The process is gone: nothing after this reaches the disk."""


class _Disk:
    """Counts the calls that change the disk and breaks the one numbered `at`."""

    def __init__(self, at: int | None, fault: str) -> None:
        self.count, self.at, self.fault = 0, at, fault
        self.real = {name: getattr(os, name) for name in _CALLS}

    def call(self, name: str, *args: object, **kwargs: object) -> object:
        number, self.count = self.count, self.count + 1
        do: Callable[..., object] = self.real[name]
        if self.fault == "power cut" and self.at is not None and number >= self.at:
            if name == "write" and number == self.at:
                do(args[0], bytes(args[1])[: len(args[1]) // 2])  # pyright: ignore[reportArgumentType]
            raise _PowerCut
        if number != self.at:
            return do(*args, **kwargs)
        if self.fault == "short write" and name == "write":
            return do(args[0], bytes(args[1])[:3])  # pyright: ignore[reportArgumentType]
        if self.fault == "late error":
            do(*args, **kwargs)
        if self.fault == "short write":
            return do(*args, **kwargs)
        code = errno.ENOSPC if self.fault == "full" else errno.EIO
        raise OSError(code, os.strerror(code))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        faulty: dict[str, Any] = {name: partial(self.call, name) for name in _CALLS}
        with mock.patch.multiple(os, **faulty):
            yield


def _campaign(act: Callable[[], None], check: Callable[[bool], None]) -> int:
    """Runs `act` with each call broken in each way; `check` is told whether `act` reported success."""
    counter = _Disk(None, "none")
    with counter():
        act()
    check(True)
    for fault in ("full", "late error", "short write", "power cut"):
        for at in range(counter.count):
            done, message = False, ""
            try:
                with _Disk(at, fault)():
                    act()
                done = True
            except (StorageError, _PowerCut) as error:
                message = str(error)
            assert done or fault != "full" or "free space" in message
            assert done or fault != "short write"
            check(done)
    return counter.count


def test_a_faulty_append_leaves_the_old_ledger_or_the_new_and_loses_nothing(
    tmp_path, owner, registrations, round_record
):
    before, folder = tmp_path / "before", tmp_path / "ledger"
    with Ledger.create(before, signer=owner, chain_id="trial-1", registrations=registrations[:2]) as ledger:
        ledger.append(round_record(0, cohort=("north",)))
    new = round_record(1, cohort=("south",))

    def act() -> None:
        with mock.patch.multiple(os, **_REAL):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(before, folder)
            ledger = Ledger.open(folder, owner)
        with ledger:
            try:
                ledger.append(new)
            except BaseException:
                with pytest.raises(LedgerError, match="open the ledger again"):
                    ledger.blocks()
                with pytest.raises(LedgerError, match="open the ledger again"):
                    ledger.append(new)
                raise

    def check(done: bool) -> None:
        assert len(Ledger.open(folder).blocks()) in ((3,) if done else (2, 3))
        with Ledger.open(folder, owner) as ledger:
            assert ledger.rounds()[0].round == 0
            ledger.append(new)
            assert [record.round for record in ledger.rounds()] == [0, 1]
            assert len(ledger.blocks()) == 3
            assert (folder / "log").read_bytes() == ledger.export()

    assert _campaign(act, check) >= 9


def test_a_faulty_creation_can_be_made_again(tmp_path, owner, registrations):
    folder = tmp_path / "ledger"

    def act() -> None:
        with mock.patch.multiple(os, **_REAL):
            shutil.rmtree(folder, ignore_errors=True)
        Ledger.create(folder, signer=owner, chain_id="trial-1", registrations=registrations[:1]).close()

    def check(done: bool) -> None:
        assert Ledger.exists(folder) or not done
        if not Ledger.exists(folder):
            Ledger.create(folder, signer=owner, chain_id="trial-1", registrations=registrations[:1]).close()
        with Ledger.open(folder, owner) as ledger:
            assert len(ledger.blocks()) == 1

    assert _campaign(act, check) >= 8


def test_a_faulty_restore_can_be_made_again_from_the_same_checkpoint(tmp_path, owner, registrations, round_record):
    folder = tmp_path / "ledger"
    with Ledger.create(
        tmp_path / "source", signer=owner, chain_id="trial-1", registrations=registrations[:1]
    ) as ledger:
        ledger.append(round_record(0, cohort=("north",)))
        data = ledger.export()

    def act() -> None:
        with mock.patch.multiple(os, **_REAL):
            shutil.rmtree(folder, ignore_errors=True)
        Ledger.restore(folder, data, signer=owner).close()

    def check(done: bool) -> None:
        with Ledger.restore(folder, data, signer=owner) as ledger:
            assert ledger.export() == data
        assert len(Ledger.open(folder).blocks()) == 2

    assert _campaign(act, check) >= 8


_REAL = {name: getattr(os, name) for name in _CALLS}


def test_a_file_size_limit_is_an_error_that_names_the_file_and_loses_nothing(chain, owner, tmp_path):
    save_key(owner, tmp_path / "key.pem")
    script = """
import dataclasses, resource, sys
from capsfl.ledger import Ledger, StorageError, load_key
ledger = Ledger.open(sys.argv[1], load_key(sys.argv[2]))
record = dataclasses.replace(ledger.rounds()[-1], round=99)
size = len(ledger.export())
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
try:
    ledger.append(record)
except StorageError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(chain), str(tmp_path / "key.pem")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output == f"{chain / 'log'}: File too large\n"
    assert len(Ledger.open(chain).blocks()) == 20
    with Ledger.open(chain, owner) as ledger:
        assert (chain / "log").read_bytes() == ledger.export()


@pytest.mark.torture
def test_a_writer_killed_at_any_moment_keeps_every_acknowledged_round(tmp_path, owner, registrations, round_record):
    save_key(owner, tmp_path / "key.pem")
    folder = tmp_path / "ledger"
    with Ledger.create(folder, signer=owner, chain_id="trial-1", registrations=registrations) as ledger:
        ledger.append(round_record(0))
    script = """
import dataclasses, sys
from capsfl.ledger import Ledger, load_key
with Ledger.open(sys.argv[1], load_key(sys.argv[2])) as ledger:
    last = ledger.rounds()[-1]
    while True:
        last = dataclasses.replace(last, round=last.round + 1)
        ledger.append(last)
        print(last.round, flush=True)
"""
    for turn in range(40 if _TORTURE else 2):
        command = [sys.executable, "-c", script, str(folder), str(tmp_path / "key.pem")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            acknowledged = [int(writer.stdout.readline()) for _ in range(2 + turn % 5)]
            writer.kill()
            acknowledged += [int(line) for line in writer.stdout.read().splitlines()]
        ledger = Ledger.open(folder)
        numbers = [record.round for record in ledger.rounds()]
        assert numbers == list(range(len(numbers)))
        assert acknowledged[-1] <= numbers[-1] <= acknowledged[-1] + 1
