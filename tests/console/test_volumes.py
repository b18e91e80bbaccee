"""The console's page about volumes."""

from __future__ import annotations

from django.test import Client

from orkestr_console.accounts.models import Team
from sandboxes_app.models import Volume
from tests.console.markup import tight


def test_a_volumes_id_can_be_copied_whole(console: Client, team: Team) -> None:
    volume = Volume.objects.create(team=team, name="data", size_mb=1024, region="local")
    shown = tight(console.get("/sandboxes/volumes/"))
    # Clients and agents take nothing less, and it has no page of its own.
    assert f'data-copy="{volume.pk}"' in shown
