"""The page of a build: its rows and logs, search, cancel, build again."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.test import Client
from django.utils import timezone

from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import Team
from templates_app import pages, services
from templates_app.models import BuildEvent, Template, TemplateStatus
from templates_app.services import output
from templates_app.specs import TemplateSpec
from tests.console.markup import tight
from tests.fakes.host import FakeHost


def text(answer: Any) -> str:
    return tight(answer)


async def streamed(answer: Any) -> str:
    return b"".join([chunk async for chunk in answer.streaming_content]).decode()


def tell(template: Template, kind: str, **payload: Any) -> BuildEvent:
    """The next event of a build."""
    last = template.events.order_by("-seq").first()
    return BuildEvent.objects.create(
        template=template,
        seq=last.seq + 1 if last else 1,
        kind=kind,
        step=payload.get("step"),
        payload=payload,
        at=timezone.now(),
    )


def failed(template: Template, output: str = "", **changes: Any) -> Template:
    """The first step went well with this output, the second failed."""
    template.steps.filter(number=1).update(status="succeeded", output=output, duration_ms=2000)
    template.steps.filter(number=2).update(status="failed", exit_code=1, duration_ms=10)
    values = {"status": TemplateStatus.FAILED, "error_message": "Step 2 of 2 failed.", **changes}
    Template.objects.filter(pk=template.pk).update(**values)
    template.refresh_from_db()
    return template


NUMBERED = "".join(f"\x1b[32mline\x1b[0m {n} of many\n" for n in range(1, 5001))


def test_a_build_that_waits_for_its_base_says_what_that_does(
    console: Client, building: Template
) -> None:
    Template.objects.filter(pk=building.pk).update(started_at=timezone.now())
    tell(building, "base", message="Preparing base code-interpreter…")
    assert "Preparing base code-interpreter…" in text(console.get(f"/templates/{building.pk}/"))
    tell(building, "base", message="Step 1 of 3: pip install pandas")
    page = text(console.get(f"/templates/{building.pk}/"))
    assert "Preparing base code-interpreter… Step 1 of 3: pip install pandas" in page


# Logs ----------------------------------------------------------------------------------------


def test_lines_have_numbers_and_earlier_ones_are_offered(
    console: Client, building: Template
) -> None:
    failed(building, NUMBERED)
    page = text(console.get(f"/templates/{building.pk}/"))
    assert '<span data-n="5000"><span class="f2">line</span> 5000 of many\n</span>' in page
    shown = [int(n) for n in re.findall(r'<span data-n="(\d+)">', page)]
    assert shown == list(range(shown[0], 5001))
    assert f'data-first="1" data-last="{shown[0] - 1}"' in page
    assert f"?line=1-{shown[0] - 1}#step-1-L{shown[0] - 1}" in page


def test_a_window_of_lines_is_the_one_asked_for(console: Client, building: Template) -> None:
    failed(building, NUMBERED)
    url = f"/templates/{building.pk}/steps/1/lines/"
    page = text(console.get(url, {"first": 1, "last": 4000, "at": 4000}))
    assert re.findall(r'<span data-n="(\d+)">', page) == [str(n) for n in range(3001, 4001)]
    assert 'data-first="1" data-last="3000"' in page
    assert 'data-first="4001" data-last="4000" hidden' in page
    middle = text(console.get(url, {"first": 1, "last": 4000, "at": 2000}))
    assert 'data-n="2000"' in middle
    gaps = re.findall(r'data-first="(\d+)" data-last="(\d+)"', middle)
    assert gaps == [("1", "1499"), ("2500", "4000")]
    # The colour that a line begins in comes from those before it.
    building.steps.filter(number=1).update(output="\x1b[31mred\n" + "on\n" * 3000)
    assert '<span class="f1">on</span>' in text(
        console.get(url, {"first": 100, "last": 120, "at": 100})
    )


@pytest.mark.parametrize("query", ["", "?first=1", "?first=-1&last=2&at=1", "?first=1&last=2&at=x"])
def test_odd_windows_are_refused(console: Client, building: Template, query: str) -> None:
    assert console.get(f"/templates/{building.pk}/steps/1/lines/{query}").status_code == 400


def test_windows_beyond_the_end_are_empty(console: Client, building: Template) -> None:
    failed(building, "one\n")
    url = f"/templates/{building.pk}/steps/1/lines/"
    assert "<span data-n" not in text(console.get(url, {"first": 5, "last": 9, "at": 7}))
    assert "<span data-n" not in text(console.get(url, {"first": 9, "last": 5, "at": 0}))
    nothing = {"first": 1, "last": 1, "at": 1}
    assert console.get(f"/templates/{building.pk}/steps/9/lines/", nothing).status_code == 404


def test_a_link_to_a_line_shows_it_without_a_script(console: Client, building: Template) -> None:
    failed(building, NUMBERED)
    page = text(console.get(f"/templates/{building.pk}/?line=1-700"))
    assert '<span data-n="700">' in page
    assert '<span data-n="5000">' in page
    assert re.search(r'id="step-1"[^>]* open>', page)
    for odd in ("1-0", "9-1", "1-999999999", "x", "1-2-3", "<b>", "1-\u0661"):
        assert console.get(f"/templates/{building.pk}/", {"line": odd}).status_code == 200


def test_one_endless_line_stays_small(console: Client, building: Template) -> None:
    failed(building, "x" * 3_000_000 + "\n" + "y\n" * 1500)
    assert len(console.get(f"/templates/{building.pk}/").content) < 400_000
    url = f"/templates/{building.pk}/steps/1/lines/"
    window = console.get(url, {"first": 1, "last": 10, "at": 1})
    assert 'data-n="1"' in text(window)
    assert "…</span>" in text(window)
    assert len(window.content) < 2_000_000


def test_many_long_logs_make_no_huge_page(console: Client, console_actor: Actor) -> None:
    spec = TemplateSpec(name="long", base_template="debian-12", recipe=["true"] * 100)
    template = services.create_template(console_actor, spec)
    Template.objects.update(status=TemplateStatus.FAILED)
    template.steps.update(status="succeeded", output=NUMBERED)
    page = text(console.get(f"/templates/{template.pk}/"))
    assert page.count("<span data-n=") == 100 * 40


def test_a_running_steps_end_is_read_from_its_events(building: Template) -> None:
    for n in range(1, 30):
        tell(building, "output", step=1, text=f"{n}\n" * 10)
    last = tell(building, "output", step=1, text="unfinished")
    tell(building, "output", step=1, text=" later")
    end = output.tail(building, 1, 40, until=last.seq)
    assert end.text.endswith("29\nunfinished")
    assert end.text.startswith("29\n")
    assert end.last == 291
    whole = output.tail(building, 1, 10_000, until=last.seq)
    assert (whole.first, whole.text.count("\n")) == (1, 290)


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("plans")
def test_what_is_copied_and_downloaded_is_plain(console: Client, building: Template) -> None:
    failed(building, "\x1b[31mred\x1b[0m\n10%\r100%\n")
    plain = console.get(f"/templates/{building.pk}/steps/1/output/?plain")
    assert text(plain) == "red\n100%\n"
    assert console.head(f"/templates/{building.pk}/log/").status_code == 200
    answer = console.get(f"/templates/{building.pk}/log/")
    assert f'filename="{building.pk}.log"' in answer["Content-Disposition"]
    whole = async_to_sync(streamed)(answer)
    assert "$ pip install pandas\nred\n100%\n" in whole


# Search --------------------------------------------------------------------------------------


def test_search_finds_lines_of_all_steps(console: Client, building: Template) -> None:
    failed(building, NUMBERED)
    building.steps.filter(number=2).update(output="nothing\nLINE 4999 of <b>\n")
    url = f"/templates/{building.pk}/search/"
    page = text(console.get(url, {"q": "line 4999"}, headers={"HX-Request": "true"}))
    assert "<html" not in page
    assert f'href="/templates/{building.pk}/?line=1-4999#step-1-L4999"' in page
    assert 'data-step-hit="2" data-line-hit="2"' in page
    assert "<mark>LINE 4999</mark> of &lt;b&gt;" in page
    assert 'data-count="2"' in page
    assert "<html" in text(console.get(url, {"q": "line 4999"}))


def test_search_counts_and_goes_on(building: Template) -> None:
    failed(building, NUMBERED)
    found = output.search(building, "of many", limit=3)
    assert [hit.line for hit in found.hits] == [1, 2, 3]
    assert (found.count, found.many) == (5000, False)
    found = output.search(building, "of many", after=(1, 4998), limit=3)
    assert [hit.line for hit in found.hits] == [4999, 5000]
    building.steps.update(output="x\n" * 6000)
    found = output.search(building, "X")
    assert (found.count, found.many, len(found.hits)) == (10_000, True, 100)


def test_search_shows_the_part_of_a_long_line(building: Template) -> None:
    failed(building, f"{'a' * 9000}Needle{'b' * 9000}\n")
    hit = output.search(building, "needle").hits[0]
    assert hit.found == "Needle"
    assert hit.before == f"…{'a' * 60}"
    assert hit.after == f"{'b' * 120}…"


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("", ""),
        ("  ", ""),
        ("absent", "No line contains “absent”"),
        ("x" * 201, "too long"),
        ("<script>", "No line contains “&lt;script&gt;”"),
        ("\u202e", "⟨U+202E⟩"),
        ("(((((.*)*)*", "No line contains"),
    ],
)
def test_odd_searches(console: Client, building: Template, wanted: str, said: str) -> None:
    failed(building, NUMBERED)
    answer = console.get(f"/templates/{building.pk}/search/", {"q": wanted})
    assert answer.status_code == 200
    assert said in text(answer)


def test_an_escape_that_never_ends_moves_no_line(console: Client, building: Template) -> None:
    """A title sequence without its end used to take the lines after it with it."""
    failed(building, "one\n\x1b]0;title\ntwo\nthree\x07\nfour\n")
    page = text(console.get(f"/templates/{building.pk}/"))
    assert '<span data-n="5">four\n</span>' in page
    assert [hit.line for hit in output.search(building, "four").hits] == [5]


# Rows ----------------------------------------------------------------------------------------


def test_a_row_says_what_its_step_did(console: Client, building: Template) -> None:
    building.steps.filter(number=1).update(
        status="succeeded", duration_ms=4200, added_bytes=1_240_000, added_files=17
    )
    began = timezone.now() - timedelta(seconds=90)
    building.steps.filter(number=2).update(status="running", started_at=began)
    Template.objects.update(started_at=began)
    page = text(console.get(f"/templates/{building.pk}/"))
    assert "+1.24\u202fMB" in page
    assert 'title="17 files"' in page
    assert f'<time data-since="{began.isoformat()}">' in page
    assert "No output for" not in page


def test_a_silent_step_says_so_until_it_prints(console: Client, building: Template) -> None:
    building.steps.filter(number=1).update(status="running", started_at=timezone.now())
    Template.objects.update(started_at=timezone.now())
    event = tell(building, "step_silent", step=1, seconds=120)
    since = (event.at - timedelta(seconds=120)).isoformat()
    page = text(console.get(f"/templates/{building.pk}/"))
    assert f'No output for <time data-since="{since}">2\xa0minutes</time>' in page
    tell(building, "output", step=1, text="there\n")
    assert "No output for" not in text(console.get(f"/templates/{building.pk}/"))


def test_how_far_the_image_is_is_on_the_page_and_comes_live(
    console: Client, building: Template
) -> None:
    building.steps.update(status="succeeded", duration_ms=1)
    Template.objects.update(started_at=timezone.now())
    url = f"/templates/{building.pk}/"
    assert "files," not in text(console.get(url))
    tell(building, "progress", phase="capture", files=120_000, bytes=1_230_000_000)
    shown = "Capturing: 120,000 files, 1.23\u202fGB"
    assert shown in text(console.get(url))
    assert shown in pages.fragments(building, url)["template-phases"]
    tell(building, "progress", phase="publish", files=7, bytes=5_000)
    assert "Writing it to disk: 7 files, 5.00\u202fkB" in text(console.get(url))
    Template.objects.update(status=TemplateStatus.READY)
    assert "Writing it to disk" not in text(console.get(url))


def test_a_cached_step_says_whose_work_it_is(
    console: Client, building: Template, console_actor: Actor
) -> None:
    spec = TemplateSpec(name="before", base_template="python-3.12", recipe=["pip install pandas"])
    before = services.create_template(console_actor, spec)
    building.steps.filter(number=1).update(
        status="cached",
        cached_at=timezone.now() - timedelta(hours=3),
        cached_from=before.image_id,
    )
    page = text(console.get(f"/templates/{building.pk}/"))
    assert "CACHED" in page
    assert "3\u202fh ago" in page
    assert f'<a href="/templates/{before.pk}/#step-1">before (' in page
    before.delete()
    assert "in an earlier build that has been deleted" in text(
        console.get(f"/templates/{building.pk}/")
    )


def test_another_teams_build_is_never_named(
    console: Client, building: Template, other_actor: Actor
) -> None:
    spec = TemplateSpec(name="secret-name", base_template="python-3.12", recipe=["true"])
    foreign = services.create_template(other_actor, spec)
    building.steps.filter(number=1).update(
        status="cached", cached_at=timezone.now(), cached_from=foreign.image_id
    )
    page = text(console.get(f"/templates/{building.pk}/"))
    assert "secret-name" not in page
    assert foreign.pk not in page


def test_the_time_is_split_into_what_is_known(console: Client, building: Template) -> None:
    building.steps.update(status="succeeded", duration_ms=1000)
    tell(building, "boot", boot_ms=31.5, duration_ms=50)
    tell(building, "scrub", duration_ms=7)
    tell(building, "capture", duration_ms=300)
    tell(building, "contents", duration_ms=39, packages={"pip": [["x", "1"]]})
    tell(building, "published", publish_ms=4)
    began = building.created_at + timedelta(seconds=3)
    Template.objects.update(status=TemplateStatus.READY, started_at=began, build_ms=2500)
    page = text(console.get(f"/templates/{building.pk}/"))
    found = re.findall(r'<i class="t-(\w+)"[^>]*></i>([\w ]+)</dt><dd>([^<]+)</dd>', page)
    assert found == [
        ("queue", "In the queue", "3.0\u202fs"),
        ("boot", "Boot", "50\u202fms"),
        ("steps", "Steps", "2.0\u202fs"),
        ("scrub", "Clean", "7\u202fms"),
        ("capture", "Capture", "300\u202fms"),
        ("contents", "List contents", "39\u202fms"),
        ("publish", "Publish", "4\u202fms"),
        ("other", "Other", "100\u202fms"),
    ]
    widths = [
        float(width)
        for width in re.findall(r'<rect class="t-\w+" x="\S+" y="0" width="([\d.]+)"', page)
    ]
    assert sum(widths) == pytest.approx(1000, abs=1)


def test_an_old_build_without_those_events_has_a_page(console: Client, building: Template) -> None:
    Template.objects.update(status=TemplateStatus.READY, build_ms=None)
    assert "Time</h2>" not in text(console.get(f"/templates/{building.pk}/"))


# Waiting, cancelling, building again ---------------------------------------------------------


def test_a_queued_build_says_its_place_and_what_it_waits_for(
    console: Client, building: Template, console_actor: Actor, team: Team
) -> None:
    page = text(console.get(f"/templates/{building.pk}/"))
    assert "Queued: number 1 in line" in page
    assert "as soon as the host has capacity" in page
    assert "Queued</span>" in page
    assert "Queued</span>" in text(console.get("/templates/"))
    team.plan.max_concurrent_builds = 1
    team.plan.save()
    Template.objects.update(started_at=timezone.now())
    spec = TemplateSpec(name="second", base_template="python-3.12", recipe=["true"])
    second = services.create_template(console_actor, spec)
    page = text(console.get(f"/templates/{second.pk}/"))
    assert "Your team has reached its limit of concurrent builds" in page


def test_cancelling_asks_and_then_says_who(console: Client, building: Template) -> None:
    assert 'data-dialog="cancel-dialog"' in text(console.get(f"/templates/{building.pk}/"))
    asked = text(console.get(f"/templates/{building.pk}/cancel/"))
    assert "Cancel the build of “data-stack”?" in asked
    building.refresh_from_db()
    assert building.status == "building"
    page = text(console.post(f"/templates/{building.pk}/cancel/", follow=True))
    assert "cancelled by" in page
    assert "Cancelled</dt>" in page
    building.refresh_from_db()
    assert building.error_code == "build_cancelled"


def test_what_has_ended_cannot_be_cancelled(console: Client, building: Template) -> None:
    failed(building)
    answer = console.post(f"/templates/{building.pk}/cancel/")
    assert answer.status_code == 409
    assert "There is no build to cancel" in text(answer)
    assert "data-stack" in text(answer)


def test_retry_is_a_new_template_that_reuses(console: Client, building: Template) -> None:
    failed(building, disk_mb=512, allow_domains=["example.org"], recipe=["a\nb", "echo done"])
    page = text(console.get(f"/templates/{building.pk}/"))
    assert "Retry from the failed step" in page
    answer = console.post(f"/templates/{building.pk}/again/", {"reuse": "failed"})
    new = Template.objects.exclude(pk=building.pk).get()
    assert answer["Location"] == f"/templates/{new.pk}/"
    assert (new.reuse, new.recipe, new.name) == ("failed", ["a\nb", "echo done"], building.name)
    assert (new.disk_mb, new.allow_domains) == (512, ["example.org"])
    assert "on<small>completed steps of failed builds" in text(console.get(f"/templates/{new.pk}/"))
    building.refresh_from_db()
    assert building.status == "failed"


@pytest.mark.parametrize("domains", [["a.example"], [], ["@default", "a.example"], None])
def test_a_build_again_with_a_host_widens_the_list_by_that_alone(
    console: Client, building: Template, domains: list[str] | None
) -> None:
    failed(building, allow_domains=domains)
    address = f"/templates/new/?from={building.pk}&allow=b.example"
    form = text(console.get(address))
    only_these = 'name="only_these" checked' in form
    assert only_these == (domains is not None and "@default" not in domains)
    own = [name for name in domains or [] if name != "@default"]
    names = " ".join([*own, "b.example"])
    assert f'value="{names}"' in form
    posted = {"name": "again", "base_template": "debian-12", "recipe": "true"}
    posted |= {"network": "restricted", "allow_domains": names}
    posted |= {"only_these": "on"} if only_these else {}
    assert console.post("/templates/new/", posted).status_code == 302
    new = Template.objects.exclude(pk=building.pk).get()
    default = [] if only_these else ["@default"]
    assert sorted(new.allow_domains or []) == sorted([*default, *own, "b.example"])


def test_rebuild_runs_everything(console: Client, building: Template) -> None:
    Template.objects.update(status=TemplateStatus.READY)
    console.post(f"/templates/{building.pk}/again/")
    assert Template.objects.exclude(pk=building.pk).get().reuse == ""
    console.post(f"/templates/{building.pk}/again/", {"reuse": "nonsense"})
    assert not Template.objects.filter(reuse="nonsense").exists()
    assert console.get(f"/templates/{building.pk}/again/").status_code == 405


def test_nothing_completed_is_nothing_to_retry_from(console: Client, building: Template) -> None:
    failed(building)
    building.steps.filter(number=1).update(status="failed")
    page = text(console.get(f"/templates/{building.pk}/"))
    assert "Retry from the failed step" not in page
    assert "Rebuild" in page


def test_a_refused_rebuild_says_why_on_the_page(
    console: Client, building: Template, team: Team, host: FakeHost
) -> None:
    failed(building)
    team.plan.max_templates = 0
    team.plan.save()
    answer = console.post(f"/templates/{building.pk}/again/")
    assert answer.status_code == 403
    assert "That didn't work" in text(answer)
    assert "data-stack" in text(answer)
    assert Template.objects.count() == 1
    host.down = True
    assert console.post(f"/templates/{building.pk}/again/").status_code == 503


def test_posts_need_the_pages_own_token(console: Client, building: Template, alice: Any) -> None:
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(alice)
    for tail in ("cancel", "again"):
        assert strict.post(f"/templates/{building.pk}/{tail}/").status_code == 403
    building.refresh_from_db()
    assert building.status == "building"


def test_the_form_takes_times_disk_and_reuse(console: Client) -> None:
    form = {
        "name": "limited",
        "base_template": "python-3.12",
        "recipe": "true",
        "network": "restricted",
        "step_timeout_seconds": "30",
        "build_timeout_seconds": "60",
        "disk_mb": " 512 ",
        "reuse": "failed",
    }
    console.post("/templates/new/", form)
    made = Template.objects.get()
    assert (made.step_timeout_seconds, made.build_timeout_seconds) == (30, 60)
    assert (made.disk_mb, made.reuse) == (512, "failed")
    page = text(console.get(f"/templates/new/?from={made.pk}&reuse=failed"))
    assert 'name="disk_mb" value="512"' in page
    assert 'name="reuse" value="failed" checked' in page
    assert 'placeholder="1800"' in page
    for name, typed, sentence in (
        ("disk_mb", "1", "The disk must be at least 256"),
        ("disk_mb", "much", "The disk must be a whole number"),
        ("step_timeout_seconds", "99999", "At most 1800 is what"),
        ("build_timeout_seconds", "0", "must be at least 1"),
        ("reuse", "all", "What to reuse must be one of"),
    ):
        answer = console.post("/templates/new/", {**form, name: typed})
        assert answer.status_code in {400, 403}
        assert sentence in answer.context["form"].errors[name]
        assert f'id="{name}-error"' in text(answer)
        assert getattr(answer.context["form"], name) == typed
    assert Template.objects.count() == 1


def test_deleting_shows_what_is_in_use(console: Client, building: Template) -> None:
    use = f"/sandboxes/of-template/{building.pk}/"
    assert use not in text(console.get(f"/templates/{building.pk}/"))
    Template.objects.update(status=TemplateStatus.READY)
    page = text(console.get(f"/templates/{building.pk}/"))
    assert f'hx-get="{use}" hx-trigger="opened"' in page
    alone = text(console.get(f"/templates/{building.pk}/delete/"))
    assert f'hx-get="{use}" hx-trigger="load"' in alone
    assert f'<a href="{use}">' in alone


TAILS = ("cancel", "again", "log", "search/?q=x", "contents", "steps/1/lines/?first=1&last=1&at=1")


@pytest.mark.parametrize("tail", TAILS)
def test_another_teams_build_is_not_there(
    other_console: Client, building: Template, tail: str
) -> None:
    url = f"/templates/{building.pk}/{tail}{'' if '?' in tail else '/'}"
    answer = other_console.post(url) if tail in {"cancel", "again"} else other_console.get(url)
    assert answer.status_code == 404
    assert "data-stack" not in text(answer)
    building.refresh_from_db()
    assert building.status == "building"
    assert Template.objects.count() == 1
