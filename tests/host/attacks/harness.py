"""Runs attacks one by one, each in a process of its own, and says what came of each.

Runs inside a container with nothing but Python's standard library; the tests import it, and the
programs that use it, for their tables.  An attack is a function: what it raises as OSError is how
it was refused, :class:`Held` is another proof that it got nowhere, and returning means that it
succeeded.  Anything else (a missing tool, a control step that failed, no answer in time) is
reported as broken, and a broken attack proves nothing.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

# How long one attack may take; an emulated machine is given longer.
SECONDS = float(os.environ.get("ATTACK_SECONDS", "10"))
SUCCEEDED = "succeeded"
HELD = "held"
BROKEN = "broken"

Action = Callable[[], object]
libc = ctypes.CDLL(None, use_errno=True)


class Held(Exception):  # noqa: N818 - an outcome, not a defect
    """The attack got nowhere; the text says what it saw instead."""


@dataclass(frozen=True)
class Attack:
    """``expected`` are the names of the errors it may be refused with, or :data:`HELD`."""

    name: str
    expected: frozenset[str]
    action: Action


@dataclass(frozen=True)
class Outcome:
    """What came of one attack: an error's name, HELD, SUCCEEDED or BROKEN, and the words."""

    name: str
    result: str
    detail: str

    @classmethod
    def parse(cls, line: str) -> Outcome:
        """Read a line of :func:`main`'s output."""
        return cls(**json.loads(line))


class Table(dict[str, Attack]):
    """The attacks of one program by name."""

    def attack(self, name: str, *expected: str) -> Callable[[Action], Action]:
        """Register the decorated function."""

        def register(action: Action) -> Action:
            self.add(name, action, *expected)
            return action

        return register

    def add(self, name: str, action: Action, *expected: str) -> None:
        """Register an attack that is to be refused with one of ``expected``."""
        assert name not in self, name
        self[name] = Attack(name, frozenset(expected or (HELD,)), action)


def number(x86_64: int, aarch64: int | None) -> int:
    """A system call's number on this machine; -1 where the architecture has none."""
    found = {"x86_64": x86_64, "aarch64": aarch64}[platform.machine()]
    return -1 if found is None else found


def syscall(call: int, *arguments: object) -> int:
    """Make a system call by number; raises OSError."""
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result: int = libc.syscall(ctypes.c_long(call), *converted)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def check(result: int) -> int:
    """Raise OSError for a C function that returned -1."""
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def main(table: Table) -> None:
    """Run the attacks of a table, or those named by arguments; print an outcome a line."""
    # The control: the very path by which attacks reach the kernel works.
    assert syscall(number(39, 172)) == os.getpid()
    for attack in table.values():
        print(json.dumps(run(attack).__dict__), flush=True)
    print("done", flush=True)


def run(attack: Attack) -> Outcome:
    """Run one attack in a child that may do to itself what it likes."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(attack, into)
    os.close(into)
    data = b""
    while select.select([out], [], [], SECONDS)[0] and (part := os.read(out, 65_536)):
        data += part
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(out)
    result, _, detail = data.decode(errors="replace").partition(" ")
    return Outcome(attack.name, result or BROKEN, detail or "it died, or took too long")


def _child(attack: Attack, into: int) -> None:
    try:
        attack.action()
        said = f"{SUCCEEDED} it came back without an error"
    except Held as held:
        said = f"{HELD} {held}"
    except OSError as error:
        said = f"{errno.errorcode.get(error.errno or 0, '?')} {error}"
    except BaseException:  # noqa: BLE001 - whatever it is, the host is to know
        said = f"{BROKEN} {traceback.format_exc()}"
    try:
        os.write(into, said.encode(errors="replace")[:60_000])
    finally:
        sys.stdout.flush()
        os._exit(0)
