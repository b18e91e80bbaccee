"""What a template or sandbox can start from: a built-in base, or a ready template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hostruntime.client.host_client import HostClient
from hostruntime.errors import HostError
from hostruntime.errors import ImageNotFound as NoImage
from hostruntime.wire.images import BaseInfo
from orkestr_console.accounts.actor import READ, Actor
from orkestr_console.accounts.models import Team
from orkestr_console.core.errors import (
    Conflict,
    DomainError,
    FleetFull,
    HostUnavailable,
    InvalidInput,
    NotFound,
)
from orkestr_console.core.hosts import Steps, ask, host, in_steps, translated_errors
from orkestr_console.core.ids import is_id
from templates_app.models import Template, TemplateStatus

# Names that clients still send, and what they stand for now.
ALIASES = {"ubuntu-24.04": "debian-12"}
TEMPLATE_ID_PREFIX = "tmpl_"
# The official client tries again by itself as often as this fits into a minute.
REQUESTED_RETRY_SECONDS = 20


@dataclass(frozen=True)
class BaseChoice:
    """One entry of the picker; one that is not ``available`` can't be used now.

    ``state`` is ready, missing, building or failed. A base ``on_request`` is made when somebody
    first uses it: a template can be built from it at any time.
    """

    id: str
    title: str
    description: str
    group: Literal["builtin", "team"]
    available: bool
    state: str = "ready"
    on_request: bool = False
    size_bytes: int | None = None
    progress: str | None = None
    error: str | None = None

    @property
    def state_text(self) -> str:
        """What there is to say of its state, for people; blank if it can be used immediately."""
        if self.state == "ready":
            return ""
        if self.state == "building":
            return "being made now" if self.on_request else "still being built"
        if not self.on_request:
            return "still being built"
        return "could not be made" if self.state == "failed" else "made when it is first used"

    @property
    def label(self) -> str:
        """The title, and the id if it differs: ``Ubuntu 24.04 (ubuntu-24.04)``."""
        return self.title if self.title == self.id else f"{self.title} ({self.id})"


@dataclass(frozen=True)
class Source:
    """What a name refers to: ``image_id`` on the host, ``name`` for people, ``id`` as requested.

    ``env`` is the environment baked into the image, as far as it is known here.
    """

    id: str
    name: str
    image_id: str
    env: Mapping[str, str] = field(default_factory=dict)


def list_bases(actor: Actor) -> list[BaseChoice]:
    """The built-in bases and the team's ready templates, newest first.

    If the host doesn't answer, the built-in ones are left out, so that the page still works.
    """
    try:
        known = host().bases()
    except HostError:
        known = []
    built_in = [built_in_choice(base) for base in known]
    rows = Template.objects.for_team(actor.team).ready().order_by("-created_at", "-pk")
    # What is in an image may be megabytes.
    rows = rows.only("pk", "name", "base_template")
    own = [
        BaseChoice(row.pk, row.name, f"on {row.base_template}", "team", available=True)
        for row in rows
    ]
    return [*built_in, *own]


def list_built_in(actor: Actor) -> list[BaseChoice]:
    """The built-in bases alone. Raises ``HostUnavailable``."""
    actor.require(READ)
    with translated_errors():
        return [built_in_choice(base) for base in host().bases()]


def built_in_choice(base: BaseInfo) -> BaseChoice:
    """A built-in base as the picker has it."""
    ready = base.state == "ready"
    return BaseChoice(
        base.name,
        base.title,
        base.description,
        "builtin",
        available=ready or base.on_request,
        state=base.state,
        on_request=base.on_request,
        size_bytes=base.size_bytes,
        progress=base.progress,
        error=None if ready else base.error,
    )


@in_steps
def resolve(team: Team, name: str, *, field: str, can_wait: bool = False) -> Steps[Source]:
    """The image behind a base's name or a template's id.

    A base that is made on request is requested, unless the caller ``can_wait`` for it, and then
    requests it itself.

    Raises ``InvalidInput`` naming ``field`` for an unknown built-in, ``NotFound`` for a template
    that is not the team's, ``Conflict`` for one that is not ready, ``FleetFull`` for a base that is
    being made, ``HostUnavailable``.
    """
    if name.startswith(TEMPLATE_ID_PREFIX):
        return team_template(team, name)
    base = ALIASES.get(name, name)
    with translated_errors():
        known = {info.name: info for info in (yield from ask(HostClient.bases))}
    if base not in known:
        raise unknown_base(name, known, field)
    info = known[base]
    if info.state != "ready" and not (info.on_request and can_wait):
        raise (yield from not_ready(info))
    return Source(name, base, base)


def not_ready(base: BaseInfo) -> Steps[DomainError]:
    """The error for a base that can't be used now; has it made, if that is done on request."""
    if not base.on_request:
        problem = "could not be created" if base.state == "failed" else "is not made"
        return HostUnavailable(
            f"The base image '{base.name}' {problem} on this host yet, which is tried by itself; "
            "try again in a minute, or ask your operator: the host agent's log says why.",
            retry_after=30,
        )
    with translated_errors():
        yield from ask(HostClient.request_base, base.name)
    if base.state == "failed":
        # Not FleetFull: the official client would hide the reason behind a minute of retries.
        return HostUnavailable(
            f"The base image '{base.name}' could not be made: {sentence_end(base.error or '')} It "
            "is being tried again; try again in a few minutes, or tell your operator.",
            retry_after=60,
        )
    doing = f" (now: {base.progress})" if base.progress else ""
    return FleetFull(
        f"The base image '{base.name}' is made when it is first used, which takes some minutes and "
        f"has begun{doing}. Nothing was created; try again then.",
        retry_after=REQUESTED_RETRY_SECONDS,
    )


def sentence_end(text: str) -> str:
    """Text that ends a sentence."""
    return text if text.endswith((".", "!", "?")) else f"{text or 'the host does not say why'}."


def team_template(team: Team, template_id: str) -> Source:
    """The image of one of the team's own templates. Raises ``NotFound`` or ``Conflict``."""
    row = (
        Template.objects.for_team(team).filter(pk=template_id).first()
        if is_id("tmpl", template_id)
        else None
    )
    if row is None:
        raise NotFound(f"There is no template {template_id!r} in your team; check the id.")
    if row.status == TemplateStatus.BUILDING:
        raise Conflict(
            f"Template '{row.name}' is still building; wait for it to be ready.",
            code="template_not_ready",
        )
    if row.status == TemplateStatus.FAILED:
        raise Conflict(
            f"The build of template '{row.name}' failed, so there is nothing to start; look at "
            "its error and build a new one.",
            code="template_not_ready",
        )
    return Source(row.pk, row.name, row.image_id, row.baked_env or row.env)


def unknown_base(name: str, known: dict[str, BaseInfo], field: str) -> InvalidInput:
    """The error for an unknown name, with the names that exist."""
    shown = name if len(name) <= 64 else f"{name[:64]}…"
    names = ", ".join(known) or "none yet"
    sentence = f"{shown!r} is not a base image here; there are {names}, and your own templates."
    return InvalidInput(f"{field}: {sentence}", fields={field: sentence})


def reclaimable_bytes(template: Template) -> int | None:
    """The bytes of disk that deleting a template frees; None if the host doesn't answer.

    What its image shares with others is not freed.
    """
    try:
        return host().image_usage(template.image_id).reclaimable_bytes
    except NoImage:
        return 0
    except HostError:
        return None
