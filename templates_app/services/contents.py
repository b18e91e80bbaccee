"""What is in a template's image, and how two images differ.

The host reports it once, when it builds the image: the digest, the packages of each manager, and
what the scrub removed. Older builds have none of it. Names and versions come from files that the
recipe's steps wrote, so they may be any text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orkestr_console.accounts.actor import Actor
from orkestr_console.core.errors import Conflict
from templates_app.models import BuildStep, StepStatus, Template
from templates_app.services.templates import get_template

# The known package managers, in display order.
MANAGERS = ("dpkg", "pip", "npm")


@dataclass(frozen=True)
class Package:
    """One installed package."""

    name: str
    version: str


@dataclass(frozen=True)
class StepSize:
    """What one step added to the disk; None if the host didn't report it, as for a cached step."""

    number: int
    command: str
    added_bytes: int | None
    added_files: int | None
    cached: bool


@dataclass(frozen=True)
class Removed:
    """What one rule of the scrub removed from the image."""

    what: str
    bytes: int
    files: int


@dataclass(frozen=True)
class Contents:
    """What is in an image.

    ``digest`` is None for builds from before digests; ``packages`` has only managers with packages.
    ``truncated`` means that there are more packages than are listed.
    """

    template: Template
    digest: str | None
    packages: Mapping[str, tuple[Package, ...]]
    truncated: bool
    steps: tuple[StepSize, ...]
    removed: tuple[Removed, ...]

    @property
    def count(self) -> int:
        """The number of packages of all managers."""
        return sum(map(len, self.packages.values()))

    @property
    def removed_bytes(self) -> int:
        """What the scrub removed altogether."""
        return sum(gone.bytes for gone in self.removed)


@dataclass(frozen=True)
class Versions:
    """A package that has different versions in a and b, perhaps several in each."""

    name: str
    a: tuple[str, ...]
    b: tuple[str, ...]


@dataclass(frozen=True)
class PackageDifference:
    """How the packages of one manager differ, each list sorted by name."""

    manager: str
    only_a: tuple[Package, ...]
    only_b: tuple[Package, ...]
    changed: tuple[Versions, ...]
    same: int

    @property
    def count(self) -> int:
        """How many packages differ."""
        return len(self.only_a) + len(self.only_b) + len(self.changed)


SIZES = {"size_bytes": "Size", "file_count": "Files", "shared_bytes": "Shared with its base"}


@dataclass(frozen=True)
class SizeDifference:
    """A measure of both images: ``size_bytes``, ``file_count`` or ``shared_bytes``."""

    name: str
    a: int | None
    b: int | None

    @property
    def label(self) -> str:
        """The measure's name in a table."""
        return SIZES[self.name]

    @property
    def is_count(self) -> bool:
        """Whether it is a count rather than a number of bytes."""
        return self.name == "file_count"

    @property
    def change(self) -> int | None:
        """How much more b has; None if either is unknown."""
        return None if self.a is None or self.b is None else self.b - self.a


@dataclass(frozen=True)
class StepDifference:
    """The steps with the same number in a and b; None where a recipe is shorter."""

    number: int
    a: StepSize | None
    b: StepSize | None

    @property
    def same_command(self) -> bool:
        """Whether both run the same command."""
        return self.a is not None and self.b is not None and self.a.command == self.b.command


@dataclass(frozen=True)
class Difference:
    """What differs between two images, ``a`` and ``b``."""

    a: Contents
    b: Contents
    packages: tuple[PackageDifference, ...]
    sizes: tuple[SizeDifference, ...]
    steps: tuple[StepDifference, ...]

    @property
    def same_image(self) -> bool:
        """Whether both have the same digest, so that every file is the same."""
        return self.a.digest is not None and self.a.digest == self.b.digest


def contents(actor: Actor, template_id: str) -> Contents:
    """What is in the image of one of the team's templates.

    Raises ``NotFound``, ``Conflict`` for a template that has no image.
    """
    template = get_template(actor, template_id)
    if not template.is_ready:
        state = "is still building" if not template.state.is_terminal else "failed"
        raise Conflict(
            f"Template '{template.name}' has no image: its build {state}.",
            code="template_not_ready",
        )
    stored = template.contents or {}
    return Contents(
        template=template,
        digest=str(stored["digest"]) if stored.get("digest") else None,
        packages=parse_packages(stored),
        truncated=bool(stored.get("truncated")),
        steps=tuple(step_size(step) for step in template.steps.defer("output")),
        removed=removed_by_scrub(template),
    )


def parse_packages(stored: Mapping[str, Any]) -> dict[str, tuple[Package, ...]]:
    """The packages by manager, known managers first."""
    lists: Mapping[str, Any] = stored.get("packages") or {}
    order = [*MANAGERS, *sorted(set(lists) - set(MANAGERS))]
    return {
        manager: tuple(Package(str(name), str(version)) for name, version in lists[manager])
        for manager in order
        if lists.get(manager)
    }


def step_size(step: BuildStep) -> StepSize:
    """What a step added."""
    return StepSize(
        step.number,
        step.command,
        step.added_bytes,
        step.added_files,
        cached=step.status == StepStatus.CACHED,
    )


def removed_by_scrub(template: Template) -> tuple[Removed, ...]:
    """What the scrub removed, largest first; an older host reported only the sum."""
    payload = template.events.filter(kind="scrub").values_list("payload", flat=True).first() or {}
    rules: Any = payload.get("removed") or []
    if not rules and payload.get("removed_bytes"):
        rules = [{"what": "caches and logs", "bytes": payload["removed_bytes"], "files": 0}]
    rows = [
        Removed(str(rule["what"]), int(rule["bytes"]), int(rule.get("files", 0))) for rule in rules
    ]
    return tuple(sorted(rows, key=lambda gone: -gone.bytes))


def compare(a: Contents, b: Contents) -> Difference:
    """How two images differ. Pure."""
    managers = [*a.packages, *(manager for manager in b.packages if manager not in a.packages)]
    return Difference(
        a=a,
        b=b,
        packages=tuple(
            compare_packages(manager, a.packages.get(manager, ()), b.packages.get(manager, ()))
            for manager in managers
        ),
        sizes=tuple(
            SizeDifference(name, getattr(a.template, name), getattr(b.template, name))
            for name in ("size_bytes", "file_count", "shared_bytes")
        ),
        steps=compare_steps(a.steps, b.steps),
    )


def compare_packages(manager: str, a: Iterable[Package], b: Iterable[Package]) -> PackageDifference:
    """How one manager's packages differ. A package may be installed in several versions."""
    in_a, in_b = versions(a), versions(b)
    return PackageDifference(
        manager,
        only_a=tuple(Package(n, ", ".join(in_a[n])) for n in sorted(in_a.keys() - in_b.keys())),
        only_b=tuple(Package(n, ", ".join(in_b[n])) for n in sorted(in_b.keys() - in_a.keys())),
        changed=tuple(
            Versions(name, in_a[name], in_b[name])
            for name in sorted(in_a.keys() & in_b.keys())
            if in_a[name] != in_b[name]
        ),
        same=sum(in_a[name] == in_b[name] for name in in_a.keys() & in_b.keys()),
    )


def versions(packages: Iterable[Package]) -> dict[str, tuple[str, ...]]:
    """The versions of each package, sorted."""
    versions_by_name: dict[str, set[str]] = {}
    for package in packages:
        versions_by_name.setdefault(package.name, set()).add(package.version)
    return {name: tuple(sorted(known)) for name, known in versions_by_name.items()}


def compare_steps(a: tuple[StepSize, ...], b: tuple[StepSize, ...]) -> tuple[StepDifference, ...]:
    """The steps side by side, by number."""
    return tuple(
        StepDifference(
            number + 1,
            a[number] if number < len(a) else None,
            b[number] if number < len(b) else None,
        )
        for number in range(max(len(a), len(b)))
    )
