"""A round is recorded while the next one computes: in order, one at a time, and no error of it gets lost."""

import threading
from collections.abc import Callable

import pytest

from capsfl import cli
from capsfl.recording import one_behind


@pytest.mark.parametrize("threaded", [True, False])
def test_calls_are_done_in_order_and_all_of_them_by_the_end(threaded: bool):
    done: list[int] = []
    with one_behind(threaded=threaded) as behind:
        for number in range(20):
            behind(done.append, number)
            assert done in (list(range(number)), list(range(number + 1)))  # at most one is still at work
    assert done == list(range(20))


def test_the_caller_goes_on_while_a_call_works_and_waits_before_the_next():
    gate, done = threading.Event(), []
    with one_behind() as behind:
        behind(lambda: done.append(gate.wait(60)))
        assert done == []  # the caller is here, the call is not through
        gate.set()
        behind(done.append, "next")
        assert done[0] is True
    assert done == [True, "next"]


def fail(words: str) -> None:
    raise ValueError(words)


def rounds(*calls: tuple[Callable[..., None], object], ending: BaseException | None = None) -> None:
    """Makes these calls one behind, and then raises."""
    with one_behind() as behind:
        for function, argument in calls:
            behind(function, argument)
        if ending is not None:
            raise ending


def test_what_a_call_raises_comes_up_at_the_next_call_which_is_not_made():
    done: list[object] = []
    with pytest.raises(ValueError, match="disk full") as raised:
        rounds((fail, "disk full"), (done.append, 1))
    assert done == []
    assert not hasattr(raised.value, "__notes__")  # it is itself, and needs no note


def test_what_the_last_call_raises_comes_up_at_the_end():
    with pytest.raises(ValueError, match="disk full"):
        rounds((fail, "disk full"))


def test_what_the_body_raises_comes_with_what_the_last_call_raised():
    with pytest.raises(KeyboardInterrupt) as raised:
        rounds((fail, "disk full"), ending=KeyboardInterrupt())
    assert raised.value.__notes__ == ["the round before was not recorded: ValueError: disk full"]


@pytest.mark.parametrize(
    ("ending", "line"),
    [
        (ValueError("bad labels"), "bad labels"),
        (OSError("the device is gone"), "the device is gone"),
        (KeyboardInterrupt(), "interrupted; run the same command again to resume"),
    ],
)
def test_the_command_line_says_both_in_one_line(monkeypatch, capsys, ending: BaseException, line: str):
    def command(_: list[str]) -> int:
        rounds((fail, "disk full"), ending=ending)
        return 0

    monkeypatch.setitem(cli.COMMANDS, "train", command)
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert capsys.readouterr().err == f"{line}; the round before was not recorded: ValueError: disk full\n"


def test_what_the_body_raises_after_a_call_that_worked_comes_alone_and_the_call_is_done():
    done: list[object] = []
    with pytest.raises(RuntimeError, match="device lost") as raised:
        rounds((done.append, 1), ending=RuntimeError("device lost"))
    assert done == [1]
    assert not hasattr(raised.value, "__notes__")
