"""A process that works when it is asked to: its answers, its errors, and that a silent or dead one is told apart."""

import pytest

from capsfl.bench.peer_process import PeerError, PeerProcess


class Impatient(PeerProcess):
    TIMEOUT_S = 0.1


def test_a_request_is_answered_and_goes_on_being_so_after_an_error():
    with PeerProcess(["cat"]) as echo:
        echo.send(number=1)
        assert echo.answer() == {"number": 1}
        echo.send(error="no such series")
        with pytest.raises(PeerError, match=r"^no such series$"):
            echo.answer()
        echo.send(number=2)
        assert echo.answer() == {"number": 2}


def test_a_silent_process_is_ended_so_that_it_answers_no_old_question_later():
    with Impatient(["sleep", "60"]) as silent:
        with pytest.raises(PeerError, match="no answer within 0 s"):
            silent.answer()
        with pytest.raises(PeerError, match="its process has ended"):
            silent.answer()


def test_a_process_that_ends_or_does_not_start_is_told_apart():
    with PeerProcess(["true"]) as ended, pytest.raises(PeerError, match="perhaps for want of memory"):
        ended.first_answer()
    with pytest.raises(PeerError, match=r"^no-such-program: No such file or directory$"):
        PeerProcess(["no-such-program"])
