"""Built-in bases, and the images of the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hostruntime.wire.message import Message


@dataclass(frozen=True)
class BaseInfo(Message):
    """A built-in base image; ``state`` is ready, missing, building or failed.

    ``digest`` is that of its definition, ``error`` is why it failed, ``progress`` what is being
    done while it is building.  One that is made ``on_request`` stays missing until somebody asks.
    """

    name: str
    title: str
    description: str
    state: str
    size_bytes: int | None = None
    digest: str | None = None
    error: str | None = None
    on_request: bool = False
    progress: str | None = None


@dataclass(frozen=True)
class Bases(Message):
    """``GET /bases``."""

    bases: tuple[BaseInfo, ...]


@dataclass(frozen=True)
class ImageInfo(Message):
    """An image of the store; ``kind`` is base or template."""

    id: str
    kind: str
    base: str | None = None
    created_at: float = 0.0
    size_bytes: int = 0
    file_count: int = 0
    shared_bytes: int = 0
    digest: str | None = None


@dataclass(frozen=True)
class Images(Message):
    """``GET /images``."""

    images: tuple[ImageInfo, ...]


@dataclass(frozen=True)
class ImageUsage(Message):
    """An image's disk usage; ``users`` counts the sandboxes and builds that use it.

    ``shared_bytes`` are hard-linked to other images too; ``reclaimable_bytes`` is the rest, which
    is freed once the image is deleted and has no users.
    """

    size_bytes: int
    shared_bytes: int
    reclaimable_bytes: int
    users: int


@dataclass(frozen=True)
class Progress(Message):
    """One line of a base's build; the last one is ``done``, with the image, or ``error``.

    An error has the fields of :meth:`hostruntime.errors.HostError.to_wire`.
    """

    kind: Literal["progress", "done", "error"]
    message: str = ""
    image: ImageInfo | None = None
    error: Mapping[str, Any] | None = None
