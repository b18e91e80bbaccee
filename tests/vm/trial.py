"""Everything that is tried on one release, in order: three starts, a logout and a reboot."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from orkestr import Sandbox

from tests.vm import inside
from tests.vm.checklist import Checklist, needed
from tests.vm.console import Clients, Console
from tests.vm.guest import Guest
from tests.vm.image import PERSON
from tests.vm.machine import Machine
from tests.vm.places import VmError

REBOOT_SECONDS = 600.0
# Ten on an ordinary machine.
SETTLED_SECONDS = 120.0
ENDED = {"terminated", "failed"}
_DENIED = re.compile(r'apparmor="DENIED"')
# What the kernel says when it has gone wrong itself.
_BROKEN = re.compile(r"\b(BUG:|Oops:|WARNING: CPU|general protection|refcount_t:|soft lockup)")


class Trial:
    """One release's machine, and what has been tried on it."""

    def __init__(self, machine: Machine, guest: Guest, checks: Checklist) -> None:
        self._machine = machine
        self._guest = guest
        self._console = Console(guest)
        self._checks = checks
        self._templates: list[str] = []
        self._excused: set[str] = set()
        self._running: Sandbox | None = None

    def run(self) -> None:
        """Try everything; what fails is in the checklist, and the rest goes on."""
        check, console = self._checks.check, self._console
        check("the machine is a stock one", self._is_stock)
        check("make doctor before the first start", console.doctor)
        check("make run, by a person with sudo, to a green self-check", console.start)
        with self._clients() as clients:
            self._try_sandboxes(clients)
            self._try_networks_and_builds(clients)
            self._try_attacks(clients)
        check("the end of the login session ends no sandbox", self._end_session)
        check("make run, by root, beside a running sandbox", partial(console.start, as_root=True))
        with self._clients() as clients:
            check("that sandbox answers still", partial(self._answers_still, clients))
        check("the kernel log: no denial but the attacks', no complaint", self._log_is_clean)
        check("the product's own logs: no error", self._nothing_went_wrong)
        check("reboot without make down", self._reboot)
        check("nothing of it is on the machine after the reboot", self._nothing_left)
        check("make run after the reboot", console.start)
        with self._clients() as clients:
            check("sandboxes from before are said to have ended", partial(self._said, clients))
            check("templates from before boot", partial(self._templates_boot, clients))
        check("make down", console.down)
        check("nothing is left on the machine", self._nothing_left)
        check("make doctor afterwards", console.doctor)
        check("the kernel log since the reboot", self._log_is_clean)
        check("the product's own logs since the reboot", self._nothing_went_wrong)

    # Stages -----------------------------------------------------------------------------

    def _try_sandboxes(self, clients: Clients | None) -> None:
        check, console = self._checks.check, self._console
        boot = partial(inside.boot, network="restricted")
        sandbox = check("official SDK: a sandbox", lambda: boot(_has(clients), "python-3.12"))
        self._running = sandbox

        def on[T](action: Callable[..., T], *before: object) -> Callable[[], T]:
            return lambda: action(*before, needed(sandbox, "there is no sandbox"))

        check("commands and files", on(inside.commands_and_files))
        init = check("AppArmor and Seccomp: init, commands, files", on(inside.confinement, console))
        check(
            "sandboxes are below no login session",
            lambda: inside.not_in_a_session(needed(init, "its init was not seen")),
        )
        check("renames and links over the image", on(inside.overlay))
        limits = check("limits are the size's", on(inside.limits_are_set, console))
        check("memory: killed, counted, lives on", on(inside.memory, console))
        check("processes", on(inside.processes))
        check("processor", on(inside.processor, console))
        check("disk", on(inside.disk))
        check("pause and resume", on(inside.pause_and_resume, clients))
        check("snapshot, and a start from it", on(inside.snapshot_and_start, clients))
        check(
            "systemctl daemon-reload takes no limit away",
            lambda: self._reload(needed(sandbox, "no sandbox"), needed(limits, "no limits")),
        )

    def _try_networks_and_builds(self, clients: Clients | None) -> None:
        check, sandbox = self._checks.check, self._running
        check(
            "egress refused by the proxy, and on record",
            lambda: inside.refused_egress(_has(clients), needed(sandbox, "no sandbox")),
        )
        check(
            "egress allowed: a registry",
            lambda: inside.allowed_egress(needed(sandbox, "no sandbox")),
        )
        for kind in inside.RECIPES:
            check(f"a restricted recipe: {kind}", partial(self._build, clients, kind))

    def _try_attacks(self, clients: Clients | None) -> None:
        check, console = self._checks.check, self._console
        # What a hostile program is denied is what the profile is for.
        before = self._denials()
        check("attacks by system call", lambda: inside.kernel_attacks(_has(clients), console))
        check(
            "attacks on the surroundings",
            lambda: inside.attacks_on_surroundings(_has(clients), console),
        )
        self._excused |= self._denials() - before

    # Checks -----------------------------------------------------------------------------

    def _build(self, clients: Clients | None, kind: str) -> None:
        self._templates.append(inside.build(_has(clients), kind))

    def _is_stock(self) -> None:
        said = self._guest.root(
            "systemctl is-system-running; stat -fc %T /sys/fs/cgroup; "
            f"cat /sys/module/apparmor/parameters/enabled; stat -c %a /home/{PERSON}"
        )
        assert said.out.split() == ["running", "cgroup2fs", "Y", "700"], str(said)

    def _reload(self, sandbox: Sandbox, before: dict[str, str]) -> None:
        self._guest.root("systemctl daemon-reload")
        # A unit with limits has systemd write the controllers of every group above it anew.
        self._guest.root("systemd-run --wait -q -p MemoryMax=64M -p TasksMax=50 /bin/true")
        limits = self._console.container(sandbox.id)["limits"]
        assert limits == before, (before, limits)
        assert inside.run(sandbox, "echo alive") == "alive\n"

    def _end_session(self) -> None:
        sandbox = needed(self._running, "no sandbox")
        pid = self._console.container(sandbox.id)["pid"]
        self._guest.root(f"loginctl terminate-user {PERSON}", check=False)
        assert self._console.container(sandbox.id)["pid"] == pid
        # The console was the session's, and may have ended with it.
        self._console.stop()
        assert self._console.container(sandbox.id)["pid"] == pid

    def _answers_still(self, clients: Clients | None) -> None:
        old = needed(self._running, "no sandbox")
        sandbox = Sandbox.get(old.id, client=_has(clients).sdk)
        assert sandbox.status == "running", sandbox.status
        assert inside.run(sandbox, "cat /workspace/notes.txt") == "grüße\n"

    def _reboot(self) -> None:
        self._excused = set()  # Its log begins anew.
        boot = self._guest.boot_id()
        with contextlib.suppress(VmError):
            self._guest.root("systemctl reboot", timeout=60, check=False)
        self._guest.await_gone(boot, REBOOT_SECONDS)
        self._machine.await_boot(self._guest)
        assert self._guest.boot_id() != boot

    def _nothing_left(self) -> None:
        left = self._console.leftovers()
        assert left == [], "\n".join(left)

    def _said(self, clients: Clients | None) -> None:
        old = needed(self._running, "no sandbox")
        # As soon as the workers have asked the host, which is not before the console serves.
        deadline = time.monotonic() + SETTLED_SECONDS
        while (status := Sandbox.get(old.id, client=_has(clients).sdk).status) not in ENDED:
            assert time.monotonic() < deadline, status
            time.sleep(1)

    def _templates_boot(self, clients: Clients | None) -> None:
        assert self._templates, "no template was built"
        for template in self._templates[:1]:
            sandbox = inside.boot(_has(clients), template)
            assert inside.run(sandbox, "echo alive") == "alive\n"
            sandbox.terminate()

    def _denials(self) -> set[str]:
        return denials(self._kernel_log())

    def _kernel_log(self) -> list[str]:
        return self._guest.root("dmesg").out.splitlines()

    def _log_is_clean(self) -> None:
        log = self._kernel_log()
        bad = [*complaints(log), *sorted(denials(log) - self._excused)]
        assert bad == [], "\n".join(bad)

    def _nothing_went_wrong(self) -> None:
        """Every sandbox may have started all the same: what failed behind them is found here."""
        bad = self._console.errors()
        assert bad == [], "\n".join(bad[:20])

    @contextmanager
    def _clients(self) -> Iterator[Clients | None]:
        """The API's clients, or none when the console does not serve: the checks say so."""
        with ExitStack() as held:
            clients: Clients | None = None
            with contextlib.suppress(VmError):
                clients = held.enter_context(self._console.clients())
            yield clients


def _has(clients: Clients | None) -> Clients:
    return needed(clients, "the console does not serve")


def denials(log: Iterable[str]) -> set[str]:
    """The lines of a kernel log by which AppArmor says that it refused something."""
    return {line for line in log if _DENIED.search(line)}


def complaints(log: Iterable[str]) -> list[str]:
    """The lines by which the kernel says that something is wrong with itself."""
    return [line for line in log if _BROKEN.search(line)]
