"""`make test-vm`: the product on whole stock Debian machines, by the README's two commands.

``python -m tests.vm [RELEASE …]``
    makes each release's machine anew, boots it, tries everything (:mod:`tests.vm.trial`), powers it
    off; prints a table of checks for each and, at the end, Markdown for the README.  Exit status 1
    if anything failed.  ``--reuse`` takes the system disks that are there, ``--keep`` leaves the
    last machine running.

For development, on one release's machine: ``build``, ``boot``, ``push COMMIT``, ``try``,
``ssh USER [COMMAND]``, ``off``, as in ``python -m tests.vm --on trixie push HEAD``.

Needs root, `qemu-system-x86` and `mmdebstrap` (installed by `make test-vm`), 12 GB of disk in
``ORKESTR_VM_DIR`` (default: below /var/tmp) and 5 GB of memory.  KVM is used where this machine's
boots such a kernel; else a release takes half an hour or more, by emulation.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from hostruntime.errors import HostError
from tests.vm.bases import base_images, git
from tests.vm.checklist import Checklist
from tests.vm.chroot import enter_own_mounts
from tests.vm.guest import Guest
from tests.vm.image import Disks
from tests.vm.machine import Files, Machine, stop_by_pid
from tests.vm.places import Places, VmError, places_from
from tests.vm.releases import RELEASES, Release
from tests.vm.report import Result, markdown, table
from tests.vm.sources import SourcesError
from tests.vm.trial import Trial
from tests.vm.versions import facts

_FAULTS = (VmError, SourcesError, HostError, OSError)


def say(line: str) -> None:
    """Print at once: a run takes long, and somebody may be watching."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Work:
    """One release's disks and machine in the work directory."""

    def __init__(self, places: Places, release: Release) -> None:
        self.release = release
        self._places = places
        directory = places.of(release.codename)
        directory.mkdir(exist_ok=True)
        self._log = directory / "build.log"
        self.disks = Disks(places, release, self._note)
        self.files = Files(self.disks.product, self.disks.kernel, self.disks.initrd, directory)

    @property
    def guest(self) -> Guest:
        """The machine that another process left running. Raises OSError without one."""
        return Guest(int(self.files.port.read_text()), self._places.key)

    def build(self, commit: str, *, reuse: bool) -> None:
        """Make the disks: the system's unless it may be reused, and the product's on it.

        A machine that was left running on the old ones is ended.
        """
        self._log.unlink(missing_ok=True)
        stop_by_pid(self.files)
        bases = base_images(self._places, commit, self._note)
        if not (reuse and self.disks.system.exists()):
            say(f"making a {self.release.title} system ({self._log} tells how)")
            self.disks.make_system()
        say(f"putting commit {commit[:12]} on it")
        # Where bootstrap.sh found it here, or one like it.
        python = None if self.release.own_python else Path(sys.base_prefix)
        self.disks.make_product(commit, python, bases)

    def machine(self) -> Machine:
        """A machine to start from the disks."""
        return Machine(self.files, self._places.key)

    def attempt(self, machine: Machine, guest: Guest, checks: Checklist) -> Result:
        """Try everything on a booted machine."""
        known = checks.check("what it is made of", lambda: facts(guest)) or {}
        checks.check("the trial comes to its end", Trial(machine, guest, checks).run)
        return self.result(checks, known)

    def result(self, checks: Checklist, known: Mapping[str, str]) -> Result:
        """What came of the release so far."""
        date = datetime.now(UTC).date().isoformat()
        return Result(self.release.title, date, known, checks.rows)

    def _note(self, line: str) -> None:
        with self._log.open("a") as log:
            log.write(f"{line}\n")


def whole(work: Work, options: argparse.Namespace) -> Result:
    """A release from nothing to its table; whatever goes wrong is a failed check of it."""
    say(f"\n== {work.release.title}")
    checks = Checklist(say)
    commit = git("rev-parse", "HEAD")
    checks.check("a machine made anew", lambda: work.build(commit, reuse=options.reuse))
    if checks.failed:
        return work.result(checks, {})
    machine = work.machine()
    guest = checks.check("it boots", lambda: machine.start(stays=options.keep))
    if guest is None:
        return work.result(checks, {})
    try:
        return work.attempt(machine, guest, checks)
    finally:
        if not options.keep:
            machine.stop(guest)


def run_all(places: Places, options: argparse.Namespace) -> int:
    """Every release that was asked for; exit status 0 when everything held."""
    enter_own_mounts()
    if git("status", "--porcelain"):
        say("what is not committed is not tried: the machines get a clone of HEAD")
    names = options.releases or list(RELEASES)
    results = [whole(Work(places, RELEASES[name]), options) for name in names]
    for result in results:
        say(table(result))
    say(f"\n{markdown(results)}")
    return 0 if all(result.held for result in results) else 1


def develop(work: Work, verb: str, rest: Sequence[str]) -> int:
    """One step on one release's machine, which stays."""
    if verb == "build":
        enter_own_mounts()
        work.build(git("rev-parse", *(rest or ["HEAD"])), reuse=True)
    elif verb == "boot":
        work.machine().start(stays=True)
    elif verb == "push":
        work.guest.push(*(rest or ["HEAD"]))
    elif verb == "try":
        result = work.attempt(work.machine(), work.guest, Checklist(say))
        say(table(result))
        say(f"\n{markdown([result])}")
        return 0 if result.held else 1
    elif verb == "ssh":
        command = work.guest.ssh(rest[0] if rest else "root")
        os.execvp(command[0], [*command, *rest[1:]])
    elif not stop_by_pid(work.files):
        say(f"no machine of {work.release.title} runs")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm")
    parser.add_argument("--reuse", action="store_true", help="take the system disks there are")
    parser.add_argument("--keep", action="store_true", help="leave the last machine running")
    parser.add_argument("--on", choices=RELEASES, help="a step of development on this release")
    options, rest = parser.parse_known_args(arguments)
    if os.geteuid() != 0:
        say("this needs root: it mounts disks and makes base images with the host agent")
        return 1
    places = places_from()
    try:
        if options.on is not None:
            verbs = argparse.ArgumentParser(prog=f"python -m tests.vm --on {options.on}")
            verbs.add_argument("verb", choices=["build", "boot", "push", "try", "ssh", "off"])
            verbs.add_argument("rest", nargs=argparse.REMAINDER)
            step = verbs.parse_args(rest)
            return develop(Work(places, RELEASES[options.on]), step.verb, step.rest)
        unknown = [name for name in rest if name not in RELEASES]
        if unknown:
            parser.error(f"no such release: {' '.join(unknown)}; there are: {' '.join(RELEASES)}")
        options.releases = rest
        return run_all(places, options)
    except _FAULTS as fault:
        say(f"FAILED: {fault}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
