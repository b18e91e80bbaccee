"""What clients ask while something is struck, and whether they were answered as was promised.

Promised are: what was asked for; or a refusal with a code, a sentence, and where it is a 503 when
to try again. Never a 500, and never silence. A connection may break with what serves it alone.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import httpx

# In which every call must have come to an end: more than any of them asks for.
LONGEST_CALL = 150.0
# The client heard nothing for its whole patience, or its connection broke.
SILENCE, CUT = "no answer", "cut off"


@dataclass(frozen=True)
class Answer:
    """What a client was told: ``kind`` is ok, refused, wrong, :data:`SILENCE` or :data:`CUT`."""

    what: str
    kind: str
    detail: str
    began: float
    ended: float

    def __str__(self) -> str:
        return f"{self.what}: {self.kind} after {self.ended - self.began:.1f} s, {self.detail}"


def kind_of(answer: httpx.Response) -> tuple[str, str]:
    """What an HTTP answer is, and what it says."""
    if answer.is_success:
        return "ok", str(answer.status_code)
    said = f"{answer.status_code} {answer.text[:300]}"
    if answer.status_code >= 500 and answer.status_code != 503:
        return "wrong", said
    try:
        record = answer.json()
    except ValueError:
        return "wrong", said
    if not record.get("code") or not record.get("detail"):
        return "wrong", f"no code or no sentence: {said}"
    if answer.status_code == 503 and "Retry-After" not in answer.headers:
        return "wrong", f"no Retry-After: {said}"
    return "refused", f"{answer.status_code} {record['code']}: {record['detail'][:200]}"


def asked(what: str, ask: Callable[[], httpx.Response | tuple[str, str]]) -> Answer:
    """Ask once, and say what came of it."""
    began = time.monotonic()
    try:
        said = ask()
        kind, detail = kind_of(said) if isinstance(said, httpx.Response) else said
    except httpx.TimeoutException as error:
        kind, detail = SILENCE, type(error).__name__
    except httpx.HTTPError as error:
        kind, detail = CUT, f"{type(error).__name__}: {error}"
    return Answer(what, kind, detail, began, time.monotonic())


@dataclass
class Call:
    """One thing a client asks for, in a thread of its own."""

    what: str
    ask: Callable[[], httpx.Response | tuple[str, str]]
    answer: Answer | None = None
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=self.what, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.answer = asked(self.what, self.ask)

    def result(self) -> Answer:
        """The answer, which must come."""
        self._thread.join(LONGEST_CALL)
        if self.answer is not None:
            return self.answer
        return Answer(self.what, SILENCE, "still waits", self._began, time.monotonic())


def results(calls: Iterable[Call]) -> list[Answer]:
    """What became of all of them."""
    return [call.result() for call in calls]


class Probe:
    """Asks the same again and again in a thread, and knows since when all answers were good."""

    PAUSE_SECONDS = 0.4

    def __init__(self, what: str, ask: Callable[[], httpx.Response | tuple[str, str]]) -> None:
        self.what = what
        self._ask = ask
        self.answers: list[Answer] = []
        self.well_since: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"probe {what}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            answer = asked(self.what, self._ask)
            self.answers.append(answer)
            if answer.kind != "ok":
                self.well_since = None
            elif self.well_since is None:
                self.well_since = answer.ended
            self._stop.wait(self.PAUSE_SECONDS)

    def answered_since(self, moment: float) -> float | None:
        """When it was first answered what was asked after ``moment``, and well ever since."""
        for answer in reversed(self.answers[-3:]):
            if self.well_since is not None and answer.began >= moment and answer.kind == "ok":
                return max(self.well_since, moment)
        return None

    def close(self) -> None:
        """Ask no more."""
        self._stop.set()
        self._thread.join(LONGEST_CALL)


def streamed(
    client: httpx.Client, sandbox: str, command: str, reached: threading.Event, lines: int
) -> tuple[str, str]:
    """Run a command and read what it prints; ``reached`` is set when so many pieces have come."""
    body = {"command": command, "stream": True}
    with client.stream("POST", f"/v1/sandboxes/{sandbox}/exec", json=body) as answer:
        if not answer.is_success:
            answer.read()
            return kind_of(answer)
        last, seen = "", 0
        for line in answer.iter_lines():
            if not line.startswith("data:"):
                continue
            last = line.removeprefix("data:").strip()
            seen += 1
            if seen >= lines:
                reached.set()
    record = json.loads(last or "{}")
    if record.get("kind") == "exec_exited":
        return ("ok" if record["code"] == 0 else "wrong"), last[:200]
    if record.get("kind") == "error" and record["code"] != "internal_error":
        return "refused", last[:300]
    # A stream that was cut without a word ends in the middle.
    return ("wrong" if record.get("kind") == "error" else CUT), f"its last word was {last[:200]}"
