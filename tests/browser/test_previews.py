"""A preview in a real browser, beside the console that leads to it."""

from __future__ import annotations

from orkestr import OrkestrClient, Sandbox
from playwright.sync_api import Page

from tests.browser.conftest import Complaints
from tests.clients.previewing import PORT, start_server
from tests.stack import Stack


def test_a_private_preview_opens_from_its_page_and_its_neighbour_cannot_use_it(
    page: Page, stack: Stack, complaints: Complaints
) -> None:
    client = OrkestrClient(api_key=stack.api_key, base_url=stack.url)
    wishes = {"template": "python-3.12-bare", "network": "restricted", "client": client}
    private = Sandbox.create(preview_auth=True, **wishes)
    other = Sandbox.create(**wishes)
    try:
        for sandbox in (private, other):
            start_server(sandbox)
        page.goto(f"/sandboxes/{private.id}/")
        page.get_by_label("Port").fill(str(PORT))
        page.get_by_role("button", name="Show address").click()
        with page.expect_popup() as opened:
            page.get_by_role("link", name=f"{PORT}-").click()
        preview = opened.value
        preview.goto(f"http://{private.get_host(PORT)}/page")
        # A WebSocket passes, with the page's own cookie and none that is of others.
        preview.get_by_text("echo hello [own=1]").wait_for()
        assert "ork_preview_token" not in preview.url
        # A page of another sandbox: its requests bring the cookie at most, and are let in by none.
        preview.goto(f"http://{other.get_host(PORT)}/page")
        preview.get_by_text("echo hello").wait_for()
        assert preview.evaluate("document.cookie") == "own=1"
        private_page = f"http://{private.get_host(PORT)}"
        seen = preview.evaluate(
            """async (address) => {
                const outcome = [];
                const asked = {credentials: 'include', mode: 'no-cors'};
                const got = await fetch(address + '/a', asked).catch(() => null);
                outcome.push(got === null ? 'blocked' : got.type);
                const socket = new WebSocket(address.replace('http', 'ws') + '/socket');
                outcome.push(await new Promise((done) => {
                    socket.onopen = () => done('open');
                    socket.onerror = () => done('refused');
                }));
                return outcome;
            }""",
            private_page,
        )
        assert seen[1] == "refused"
        # The person goes there, and is still known.
        preview.goto(f"{private_page}/a")
        assert '"name": "here"' in preview.content()
    finally:
        for sandbox in (private, other):
            sandbox.terminate()
