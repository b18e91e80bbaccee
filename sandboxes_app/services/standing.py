"""Whether the rows and the host belong together."""

from __future__ import annotations

from orkestr_console.core.hosts import host
from orkestr_console.core.postgres import release_connection
from sandboxes_app.models import Snapshot
from templates_app.models import Template


def has_known_objects() -> bool:
    """Whether any row refers to an image or snapshot on the host. Raises the host's errors."""
    release_connection()
    images = [image.id for image in host().images() if image.kind == "template"]
    snapshots = [snapshot.id for snapshot in host().snapshots()]
    return (
        Template.objects.filter(image_id__in=images).exists()
        or Snapshot.objects.filter(pk__in=snapshots).exists()
    )
