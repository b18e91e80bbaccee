"""Sandboxes under ``/v1``."""

from __future__ import annotations

from django.urls import path

from orkestr_console.http.decorators import methods
from sandboxes_app import api, background_api, files_api, interpreter_api, volume_api

one = "sandboxes/<str:sandbox_id>"

urlpatterns = [
    path("sandboxes", methods(GET=api.list_sandboxes, POST=api.create_sandbox)),
    path("sandboxes/limits", methods(GET=api.get_limits)),
    path("sandboxes/snapshots", methods(GET=api.list_snapshots)),
    path(
        "sandboxes/snapshots/<str:snapshot_id>",
        methods(GET=api.get_snapshot, DELETE=api.delete_snapshot),
    ),
    path("sandboxes/volumes", methods(GET=volume_api.list_volumes, POST=volume_api.create_volume)),
    path(
        "sandboxes/volumes/<str:volume_id>",
        methods(
            GET=volume_api.get_volume,
            PATCH=volume_api.update_volume,
            DELETE=volume_api.delete_volume,
        ),
    ),
    path("sandboxes/volumes/<str:volume_id>/move", methods(POST=volume_api.move_volume)),
    path(one, methods(GET=api.get_sandbox, DELETE=api.terminate_sandbox)),
    path(f"{one}/snapshots", methods(POST=api.create_snapshot)),
    path(f"{one}/timeout", methods(POST=api.set_timeout)),
    path(f"{one}/pause", methods(POST=api.pause_sandbox)),
    path(f"{one}/resume", methods(POST=api.resume_sandbox)),
    path(f"{one}/exec", methods(POST=api.exec_command)),
    path(
        f"{one}/commands",
        methods(GET=background_api.list_commands, POST=background_api.start_command),
    ),
    path(
        f"{one}/commands/<str:command_id>",
        methods(GET=background_api.get_command, DELETE=background_api.kill_command),
    ),
    path(f"{one}/commands/<str:command_id>/logs", methods(GET=background_api.read_logs)),
    path(f"{one}/code", methods(POST=interpreter_api.run_code)),
    path(
        f"{one}/code/contexts",
        methods(GET=interpreter_api.list_contexts, POST=interpreter_api.create_context),
    ),
    path(f"{one}/code/contexts/<str:context_id>", methods(DELETE=interpreter_api.remove_context)),
    path(
        f"{one}/code/contexts/<str:context_id>/restart",
        methods(POST=interpreter_api.restart_context),
    ),
    path(
        f"{one}/files",
        methods(GET=files_api.read_path, POST=files_api.write_file, DELETE=files_api.delete_path),
    ),
    path(f"{one}/metrics", methods(GET=api.get_metrics)),
    path(f"{one}/host", methods(GET=api.get_host)),
    path(f"{one}/egress", methods(GET=api.list_egress)),
    path(f"{one}/files/mkdir", methods(POST=files_api.mkdir)),
    path(f"{one}/files/move", methods(POST=files_api.move)),
    path(f"{one}/files/stat", methods(GET=files_api.stat)),
    path(f"{one}/files/batch", methods(POST=files_api.write_batch)),
    path(f"{one}/files/presign-upload", methods(POST=files_api.presign_upload)),
    path(f"{one}/files/presign-download", methods(POST=files_api.presign_download)),
    path("transfers/<str:address>", methods(GET=files_api.download, PUT=files_api.upload)),
    # A template's address, but only sandboxes know who uses it.
    path("templates/<str:template_id>/usage", methods(GET=api.get_template_use)),
]
