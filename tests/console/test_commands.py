"""Background commands, and what happens at the end of a lifetime, on a sandbox's pages."""

from __future__ import annotations

import pytest
from django.test import Client

from hostruntime.wire.commands import RefusedRequest
from sandboxes_app import pages
from sandboxes_app.models import Sandbox
from tests.console.markup import tight
from tests.fakes.host import FakeHost

HTMX = {"HX-Request": "true"}


@pytest.fixture
def page(sandbox: Sandbox) -> str:
    return f"/sandboxes/{sandbox.pk}"


@pytest.fixture
def command(console: Client, page: str, host: FakeHost, sandbox: Sandbox) -> str:
    """The id of a command that runs."""
    typed = {"command": "serve <b>\nsecond line", "background": "on"}
    answer = console.post(f"{page}/exec/", typed, headers=HTMX)
    assert answer["HX-Trigger"] == "commands"
    (made,) = host.background[sandbox.pk]
    assert f"{page}/commands/{made}/" in tight(answer)
    assert "data-failed" not in tight(answer)
    return made


def test_a_command_is_listed_shown_and_stopped(
    console: Client, page: str, command: str, host: FakeHost
) -> None:
    listed = tight(console.get(f"{page}/commands/", headers=HTMX))
    assert "serve &lt;b&gt;" in listed
    assert "second line" not in listed
    assert "every 5s" in listed
    host.print_more(command, b"\x1b[31mred\x1b[0m <i>")
    shown = tight(console.get(f"{page}/commands/{command}/", headers=HTMX))
    assert "every 2s" in shown
    assert "&lt;i&gt;" in shown
    stopped = tight(console.post(f"{page}/commands/{command}/stop/", follow=True))
    assert 'data-status="killed"' in stopped
    assert "every" not in stopped
    assert "every" not in tight(console.get(f"{page}/commands/", headers=HTMX))
    file = console.get(f"{page}/commands/{command}/output/")
    assert file.content == b"red <i>"
    assert file["Content-Disposition"] == f'attachment; filename="{command}.txt"'


def test_of_long_output_the_last_part_is_shown(
    console: Client, page: str, command: str, host: FakeHost
) -> None:
    # Two bytes each: the part begins within one of them.
    host.print_more(command, b"first" + "ä".encode() * (pages.OUTPUT_BYTES // 2) + b"last")
    refused = (RefusedRequest("a.test", 443, "not_listed"),)
    host.end_command(command, 3, refused=refused)
    shown = tight(console.get(f"{page}/commands/{command}/"))
    assert "While this command ran, the network policy refused its sandbox a.test:443." in shown
    assert "first" not in shown
    assert "älast" in shown
    assert "?ä" not in shown
    assert "The last part of" in shown
    assert "Exit 3" in shown


def test_a_command_that_cannot_start_is_kept_in_the_box(
    console: Client, page: str, sandbox: Sandbox
) -> None:
    console.post(f"{page}/pause/")
    typed = {"command": "serve", "background": "on"}
    assert "paused" in tight(console.post(f"{page}/exec/", typed, headers=HTMX))
    without_script = console.post(f"{page}/exec/", typed)
    assert without_script.context["form"].command == "serve"
    assert without_script.context["form"].background


def test_an_ended_sandbox_has_no_commands(console: Client, page: str, command: str) -> None:
    console.post(f"{page}/terminate/")
    assert 'id="commands"' not in tight(console.get(f"{page}/"))
    assert "is terminated" in tight(console.get(f"{page}/commands/"))
    assert console.get(f"{page}/commands/{command}/").status_code == 409


@pytest.mark.parametrize("gone", ["sandbox", "command"])
def test_what_is_gone_is_not_asked_for_again(
    console: Client, page: str, command: str, host: FakeHost, gone: str
) -> None:
    shown = tight(console.get(f"{page}/commands/{command}/", headers=HTMX))
    assert shown.count("hx-get") == 1
    assert 'id="command-poll"' in shown
    if gone == "sandbox":
        console.post(f"{page}/terminate/")
    else:
        [known] = host.background.values()
        known.clear()
    answer = console.get(f"{page}/commands/{command}/", headers=HTMX)
    assert (answer.status_code, answer["HX-Retarget"]) == (200, "#command-poll")
    assert answer["HX-Reswap"] == "outerHTML"
    last = tight(answer)
    assert ("is terminated" if gone == "sandbox" else "forgotten") in last
    assert "seeing the command" in last
    assert "hx-" not in last


def test_commands_of_another_teams_sandbox_are_not_there(
    other_console: Client, page: str, command: str
) -> None:
    for address in ("", f"{command}/", f"{command}/output/"):
        assert other_console.get(f"{page}/commands/{address}").status_code == 404
    assert other_console.post(f"{page}/commands/{command}/stop/").status_code == 404


def test_a_sandbox_can_be_paused_at_the_end_and_resume_by_itself(console: Client) -> None:
    form = {"template": "debian-12", "size": "small", "network": "off", "timeout_seconds": "600"}
    refused = console.post("/sandboxes/new/", {**form, "on_timeout": "sleep"})
    assert refused.status_code == 400
    assert "must be one of" in tight(refused)
    chosen = {"on_timeout": "pause", "auto_resume": "on", "preview_auth": "on"}
    made = console.post("/sandboxes/new/", {**form, **chosen})
    sandbox = Sandbox.objects.get()
    assert (sandbox.on_timeout, sandbox.auto_resume, sandbox.preview_auth) == ("pause", True, True)
    shown = tight(console.get(made["Location"]))
    assert "<dt>At the end</dt>" in shown
    assert "resumes by itself" in shown
