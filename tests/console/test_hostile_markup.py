"""Whatever people and programs write is text on every page: stored and reflected XSS.

One table: what is hostile × where it is shown. Each hostile text has a name of its own, so that a
page tells whether it arrived (as text, or as an attribute's value) and whether it became markup.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from django.http import QueryDict
from django.template.loader import render_to_string
from django.test import Client
from django.utils import timezone

from hostruntime.errors import ExecTimeout
from hostruntime.wire.commands import ExecResult
from hostruntime.wire.health import EgressHost
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.limits import KINDS
from orkestr_console.accounts.models import AuditEntry, Invitation, Plan, Team, User
from orkestr_console.console.people_forms import InviteForm
from orkestr_console.ui.ansi import Log, lines_html
from sandboxes_app import pages as sandbox_pages
from sandboxes_app.models import Sandbox
from templates_app import pages as template_pages
from templates_app.models import BuildEvent, BuildStep, Template, TemplateStatus
from tests.api.asking import post
from tests.conftest import PASSWORD
from tests.console.markup import tight
from tests.fakes.fixtures import run_queue
from tests.fakes.host import FakeHost

HOSTILE = (
    '" x55z=1 autofocus onfocus="x55z"><script>x55z()</script><svg/onload=x55z><x55z onload=x>',
    "' x55z=1 autofocus onfocus='x55z'><x55z>",
    "javascript:x55z()//</textarea></title></script>--><x55z>&lt;x55z&gt;{{ x55z }}{% x55z %}",
)
LINKS = {"href", "src", "action", "formaction", "xlink:href", "data", "hx-get", "hx-post"}


class Reader(HTMLParser):
    """What a browser would make of a page: its texts and values, and what in it would run."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.read: list[str] = []
        self.runs: list[str] = []
        self._script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._script = tag == "script"
        if tag == "x55z" or (tag == "script" and "src" not in values):
            self.runs.append(f"<{tag}>")
        for name, value in attrs:
            self.read.append(value or "")
            runs = name.startswith("on") or name in {"x55z", "style", "srcdoc"}
            if runs or (name in LINKS and (value or "").lower().strip().startswith("javascript:")):
                self.runs.append(f"{tag} {name}={value!r}")

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        self.read.append(data)
        if self._script and data.strip():
            self.runs.append(data)


def shows(page: str, text: str, number: int = 0) -> None:
    """Page ``number`` has ``text`` in it, to be read, and nothing in it came to life."""
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.runs == []
    whole = "".join(reader.read)
    assert text in whole or text.lower() in whole, (
        f"page {number} proves nothing: no {text!r} on it"
    )


@pytest.mark.parametrize(
    "markup",
    [
        f"<p>{HOSTILE[0]}</p>",
        f'<input value="{HOSTILE[0]}">',
        f"<input value='{HOSTILE[1]}'>",
        f"<textarea>{HOSTILE[2]}</textarea>",
        f'<a href="{HOSTILE[2]}">',
    ],
)
def test_a_page_that_escapes_nothing_is_found_out(markup: str) -> None:
    """The check itself: where each was made for, unescaped, it would have run."""
    reader = Reader()
    reader.feed(markup)
    reader.close()
    assert reader.runs


class Cast:
    """Who and what there is for a place to be hostile with."""

    def __init__(self, console: Client, api: Client, host: FakeHost, team: Team) -> None:
        self.console, self.api, self.host, self.team = console, api, host, team
        self.operator = Client()
        self.operator.force_login(User.objects.create_superuser("root@example.org", "x"))

    def get(self, *paths: str, by: Client | None = None) -> list[str]:
        return [said((by or self.console).get(path)) for path in paths]

    def template(self, **changes: Any) -> Template:
        body = {"name": "t", "base_template": "debian-12", "recipe": ["true"], **changes}
        answer = post(self.api, "/v1/templates", body)
        assert answer.status_code == 201, answer.content
        return Template.objects.get(pk=answer.json()["id"])

    def sandbox(self, **changes: Any) -> Sandbox:
        answer = post(self.api, "/v1/sandboxes", {"template": "debian-12", **changes})
        assert answer.status_code == 201, answer.content
        return Sandbox.objects.get(pk=answer.json()["id"])


def said(answer: Any) -> str:
    assert answer.status_code < 500, answer.content
    assert answer.headers["Content-Type"].startswith("text/html")
    return tight(answer)


@pytest.fixture
def cast(console: Client, api: Client, host: FakeHost, team: Team) -> Cast:
    return Cast(console, api, host, team)


def fragments(parts: dict[str, str]) -> str:
    return "".join(parts.values())


# What is hostile, by where it comes in. Each returns every page and fragment that shows it. ------


def template_name(cast: Cast, text: str, actor: Actor) -> list[str]:
    template = cast.template(name=text)
    one = f"/templates/{template.pk}/"
    found = cast.get("/templates/", one, f"{one}delete/", f"/templates/new/?from={template.pk}")
    rows = template_pages.list_context(actor, None)
    live = render_to_string("templates_app/_list.html#list", rows)
    found += [live, fragments(template_pages.fragments(template, "http://x"))]
    run_queue()
    box = cast.sandbox(template=template.pk)
    context = {"sandboxes": [box], "status": ""}
    found += cast.get("/sandboxes/new/", "/sandboxes/", f"/sandboxes/{box.pk}/", "/team/tokens/")
    found += [fragments(sandbox_pages.fragments(box, "http://x"))]
    found += [render_to_string("sandboxes_app/_list.html#list", context)]
    return [*found, said(cast.console.post(f"{one}delete/", follow=True))]


def recipe(cast: Cast, text: str, actor: Actor) -> list[str]:
    template = cast.template(recipe=[text])
    live = fragments(template_pages.fragments(template, "http://x"))
    return [*cast.get(f"/templates/{template.pk}/", f"/templates/new/?from={template.pk}"), live]


def step_output(cast: Cast, text: str, actor: Actor) -> list[str]:
    template = cast.template()
    BuildStep.objects.update(status="running")
    now = {"at": timezone.now(), "seq": 2, "kind": "output", "step": 1}
    BuildEvent.objects.create(template=template, payload={"text": f"\x1b[1m{text}\n"}, **now)
    while_building = cast.get(f"/templates/{template.pk}/")
    BuildStep.objects.update(output=f"{text}\n\x1b[31m{text}", status="failed")
    Template.objects.update(status=TemplateStatus.FAILED)
    lines, tail = Log().feed(f"{text}\n{text}")
    return [*while_building, *cast.get(f"/templates/{template.pk}/"), lines_html(lines), tail]


def build_error(cast: Cast, text: str, actor: Actor) -> list[str]:
    template = cast.template()
    facts = {"status": TemplateStatus.FAILED, "error_message": f"{text}\nlast: {text}"}
    Template.objects.update(**facts)
    first = cast.get(f"/templates/{template.pk}/")
    Template.objects.update(error_message="Step 1 failed.", refused_hosts=[text])
    template.refresh_from_db()
    live = fragments(template_pages.fragments(template, "http://x"))
    return [*first, *cast.get(f"/templates/{template.pk}/"), live]


def metadata(cast: Cast, text: str, actor: Actor) -> list[str]:
    box = cast.sandbox(metadata={text: "1", "label": text})
    Sandbox.objects.update(error_message=text)
    context = sandbox_pages.list_context(actor, None, None)
    live = [
        render_to_string("sandboxes_app/_list.html#list", context),
        fragments(sandbox_pages.fragments(box, "http://x")),
    ]
    return [*cast.get("/sandboxes/", f"/sandboxes/{box.pk}/"), *live]


def command(cast: Cast, text: str, actor: Actor) -> list[str]:
    box = cast.sandbox()
    cast.host.answers[text] = ExecResult(
        code=0, signal=None, stdout=text.encode(), stderr=text.encode(), duration_ms=3
    )
    path, form = f"/sandboxes/{box.pk}/exec/", {"command": text}
    found = [said(cast.console.post(path, form, headers=h)) for h in ({}, {"HX-Request": "true"})]
    cast.host.answers[text] = ExecTimeout(f"{text} took too long.")
    form["cwd"] = f"/{text}"
    return [
        *found,
        *(said(cast.console.post(path, form, headers=h)) for h in ({}, {"HX-Request": "true"})),
    ]


def egress(cast: Cast, text: str, actor: Actor) -> list[str]:
    box = cast.sandbox(network="restricted")
    use = EgressHost(text, 443, 0, 1, "refused", f"{text} is refused", 1.0, 0, 0)
    cast.host.egress[box.pk] = [use]
    path = f"/sandboxes/{box.pk}/egress/"
    return [*cast.get(path), said(cast.console.get(path, headers={"HX-Request": "true"}))]


def typed_in_sandbox_form(cast: Cast, text: str, actor: Actor) -> list[str]:
    form = {"template": text, "env": f"{text}\nno variable", "allow_domains": text, "size": text}
    page = said(cast.console.post("/sandboxes/new/", form))
    return [page, *cast.get(f"/sandboxes/new/?{query(template=text)}")]


def typed_in_template_form(cast: Cast, text: str, actor: Actor) -> list[str]:
    form = {"name": f"{text}{'x' * 200}", "base_template": text, "recipe": text}
    page = said(cast.console.post("/templates/new/", {**form, "allow_domains": text}))
    return [page, *cast.get(f"/templates/new/?{query(base=text)}")]


def audit_entry(cast: Cast, text: str, actor: Actor) -> list[str]:
    facts = {"who": text, "surface": "rest", "action": text[:64], "object_id": text[:64]}
    texts = {"detail": text, "object_name": text, "code": text[:40], "address": text[:64]}
    for outcome in ("done", "denied"):
        AuditEntry.objects.create(
            team_id=cast.team.pk, outcome=outcome, data={text: [text]}, **facts, **texts
        )
    return cast.get("/team/audit/")


def audit_by_use(cast: Cast, text: str, actor: Actor) -> list[str]:
    """A name and a refused call that get there by themselves."""
    cast.template(name=text)
    wanted = text.replace("/", "")[:60]
    assert cast.api.delete(f"/v1/templates/{quote(wanted, safe='')}").status_code == 404
    page = cast.get("/team/audit/")
    shows(page[0], wanted)
    return page


def filters(cast: Cast, text: str, actor: Actor) -> list[str]:
    names = ("who", "text", "since", "until")
    found = cast.get(*(f"/team/audit/?{query(**{name: text})}" for name in names))
    found += cast.get(f"/operator/?{query(q=text)}", f"/teams/?{query(q=text)}", by=cast.operator)
    return [*found, *cast.get(f"/teams/?{query(q=text)}")]


def user_agent(cast: Cast, text: str, actor: Actor) -> list[str]:
    browser = Client(headers={"User-Agent": text})
    browser.post("/sign-in/", {"email": "alice@example.org", "password": PASSWORD})
    return cast.get("/account/", by=browser)


def token_name(cast: Cast, text: str, actor: Actor) -> list[str]:
    form = {"name": text, "scopes": "sandboxes:read", "days": "1"}
    made = said(cast.console.post("/team/tokens/", form))
    listed = cast.get("/team/tokens/")
    key = cast.team.tokens.get(name=text)
    gone = said(cast.console.post(f"/team/tokens/{key.pk}/revoke/", follow=True))
    bad = said(cast.console.post("/team/tokens/", {**form, "days": text}))
    return [made, *listed, gone, bad]


def team_name(cast: Cast, text: str, actor: Actor) -> list[str]:
    made = said(cast.operator.post("/operator/teams/new/", {"name": text, "plan": "pro"}))
    team = Team.objects.get(name=text)
    found = [made, *cast.get("/operator/", f"/operator/teams/{team.pk}/", by=cast.operator)]
    cast.team.name = text
    cast.team.save()
    link = Invitation.objects.create(team=cast.team, digest="0" * 64, expires_at=timezone.now())
    joining = render_to_string("console/join.html", {"invitation": link, "form": InviteForm()})
    everywhere = ("/templates/", "/teams/", "/team/limits/", "/team/usage/", "/team/tokens/")
    return [*found, joining, *cast.get(*everywhere, "/team/audit/", "/team/people/")]


def plan_and_note(cast: Cast, text: str, actor: Actor) -> list[str]:
    Plan.objects.update(name=text)
    blank = dict.fromkeys(KINDS, "")
    path = f"/operator/teams/{cast.team.pk}/"
    cast.operator.post(path, {**blank, "plan": "team", "note": text})
    bad = {**blank, "plan": text, "note": text, "max_templates": text}
    wrong = [cast.operator.post(path, bad), cast.console.post("/team/limits/", bad)]
    pages = cast.get("/operator/", "/operator/plans/pro/", path, by=cast.operator)
    return [*map(said, wrong), *pages, *cast.get("/templates/", "/team/limits/", "/templates/new/")]


def person_name(cast: Cast, text: str, actor: Actor) -> list[str]:
    assert actor.user
    cast.console.post("/account/name/", {"name": text})
    cast.console.post("/team/people/", {"role": "member"})
    bob = User.objects.get(email="bob@example.org")
    User.objects.filter(pk=bob.pk).update(name=text)
    one = f"/team/people/{bob.pk}/"
    pages = ("/account/", "/team/people/", "/templates/", one, f"{one}remove/", "/team/tokens/")
    wrong = said(cast.console.post("/account/name/", {"name": text + "x" * 200}))
    role = said(cast.console.post(one, {"role": text}))
    return [*cast.get(*pages), wrong, html_of_role(role, text)]


def html_of_role(page: str, text: str) -> str:
    """The sentence quotes what was sent as Python does, which may double its backslashes."""
    return page.replace(html.escape(repr(text)), html.escape(text))


def invitation_email(cast: Cast, text: str, actor: Actor) -> list[str]:
    refused = said(cast.console.post("/team/people/", {"role": "member", "email": text}))
    wrong = said(Client().post("/sign-in/", {"email": text, "password": "x"}))
    form = {"name": "n", "plan": "pro", "email": text}
    return [refused, wrong, said(cast.operator.post("/operator/teams/new/", form))]


def query(**values: str) -> str:
    data = QueryDict(mutable=True)
    data.update(values)
    return data.urlencode()


PLACES: tuple[Callable[[Cast, str, Actor], list[str]], ...] = (
    template_name,
    recipe,
    step_output,
    build_error,
    metadata,
    command,
    egress,
    typed_in_sandbox_form,
    typed_in_template_form,
    audit_entry,
    audit_by_use,
    filters,
    user_agent,
    token_name,
    team_name,
    plan_and_note,
    person_name,
    invitation_email,
)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.usefixtures("bob")
def test_it_is_read_and_does_not_run(
    cast: Cast,
    console_actor: Actor,
    place: Callable[[Cast, str, Actor], list[str]],
    text: str,
) -> None:
    pages = place(cast, text, console_actor)
    assert len(pages) >= 1
    for number, page in enumerate(pages):
        shows(page, text, number)


QUOTED = '"<x55z/onload=x55z>"@example.org'


def test_an_address_may_be_hostile_and_valid(cast: Cast) -> None:
    """RFC 5321 lets a quoted local part hold anything."""
    answer = cast.console.post("/team/people/", {"role": "member", "email": QUOTED})
    shows(said(answer), QUOTED)
    shows(cast.get("/team/people/")[0], QUOTED)
    link = answer.context["link"].partition("testserver")[2]
    shows(said(Client().get(link)), QUOTED)
    shows(cast.get("/team/audit/")[0], QUOTED)


@pytest.mark.parametrize("text", HOSTILE)
def test_output_and_names_are_no_page_where_they_are_sent_as_they_are(
    cast: Cast, text: str
) -> None:
    """The whole output, and REST: what browsers are told to take for text, or for JSON."""
    template = cast.template(name=text)
    BuildStep.objects.update(output=text)
    answers = [
        (cast.console.get(f"/templates/{template.pk}/steps/1/output/"), "text/plain"),
        (cast.api.get(f"/v1/templates/{template.pk}"), "application/json"),
        (cast.api.get(f"/v1/templates?{query(cursor=text)}"), "application/json"),
        (cast.api.get(f"/v1/templates/{query(x=text)}"), "application/json"),
    ]
    box = cast.sandbox(metadata={"label": text})
    cast.host.booted[box.pk].files[f"/workspace/{text.replace('/', '')}"] = b"x"
    listing = cast.api.get(f"/v1/sandboxes/{box.pk}/files?path=/workspace")
    assert text.replace("/", "") in [entry["name"] for entry in listing.json()["entries"]]
    for answer, kind in [*answers, (listing, "application/json")]:
        assert answer.headers["Content-Type"].startswith(kind)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert text in answers[0][0].content.decode()


# Where text is said to be markup already, and who made it so. Whoever adds one decides here.
TRUSTED = {
    "orkestr_console/ui/ansi.py: mark_safe(": 2,  # escaped in dressed()
    "orkestr_console/console/account_views.py: mark_safe(": 1,  # segno's drawing of our secret
    "static/js/find.js: innerHTML": 1,  # _search.html, from our own address
    "static/js/live.js: innerHTML": 1,  # our own partials and ansi.py, by our own socket
    "static/js/log.js: innerHTML": 2,
    "static/js/log.js: insertAdjacentHTML": 1,
    "static/js/live.js: outerHTML": 1,
}
TRUSTING = re.compile(
    r"mark_safe\(|\|\s*safe\b|\|\s*safeseq\b|autoescape\s+off|SafeString\(|__html__"
    r"|(?:inner|outer)HTML\b(?!\")|insertAdjacentHTML|document\.write|\beval\(|new Function\("
    r"|srcdoc|\bstyle=|\bon[a-z]+=\"|javascript:"
)


def test_what_is_taken_for_markup_is_known() -> None:
    tree = Path(__file__).resolve().parents[2]
    places = [tree / name for name in ("orkestr_console", "sandboxes_app", "templates_app")]
    files = [f for place in places for f in place.rglob("*") if f.suffix in {".py", ".html"}]
    files += (tree / "static/js").rglob("*.js")
    assert len(files) > 150
    found = Counter(
        f"{file.relative_to(tree)}: {use}"
        for file in files
        for use in TRUSTING.findall(file.read_text())
    )
    assert found == TRUSTED
