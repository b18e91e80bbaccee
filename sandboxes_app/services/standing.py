"""Whether the rows and the host belong together."""

from __future__ import annotations

from orkestr_console.core.hosts import host
from orkestr_console.core.postgres import release_connection
from sandboxes_app.models import Snapshot, Volume
from templates_app.models import Template


def has_known_objects() -> bool:
    """Whether any row refers to something that the host keeps. Raises the host's errors."""
    release_connection()
    images = [image.id for image in host().images() if image.kind == "template"]
    snapshots = [snapshot.id for snapshot in host().snapshots()]
    volumes = [volume.id for volume in host().volumes()]
    return (
        Template.objects.filter(image_id__in=images).exists()
        or Snapshot.objects.filter(pk__in=snapshots).exists()
        or Volume.objects.filter(pk__in=volumes).exists()
    )
