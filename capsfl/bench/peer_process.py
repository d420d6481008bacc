"""A process beside ours that works only when it is asked to, so that contestants of a benchmark can take turns."""

import json
import selectors
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, Self


class PeerError(Exception):
    """The peer cannot do what was asked; the message says why."""


class PeerProcess:
    """A process that answers a request, a line of JSON, with such a line; use it as a context manager.

    One request at a time: the next one may be sent when the one before is answered.

    Args:
        command: What to start.
        environment: Its variables; None for those of this process.

    Raises:
        PeerError: It does not start.
    """

    TIMEOUT_S = 300.0
    ENDED = "its process has ended, perhaps for want of memory"

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        except OSError as error:
            raise PeerError(f"{command[0]}: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def send(self, **request: Any) -> None:
        """Asks for something; `answer` waits for what comes of it.

        Raises:
            PeerError: The process has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerError("its process has ended") from None

    def answer(self) -> dict[str, Any]:
        """Waits for the next answer.

        Raises:
            PeerError: It is silent for too long, has ended, or tells of an error.
        """
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._process.stdout, selectors.EVENT_READ)
            if not waiting.select(self.TIMEOUT_S):
                self._process.kill()  # it would answer an old question later
                raise PeerError(f"no answer within {self.TIMEOUT_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(self.ENDED)
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply

    def first_answer(self) -> dict[str, Any]:
        """What it tells of itself before it is asked anything; a process that cannot is closed.

        Raises:
            PeerError: As `answer`.
        """
        try:
            return self.answer()
        except PeerError:
            self.close()
            raise
