"""No record of a log can pretend to be two, colour a terminal, or give a secret away."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.db import IntegrityError, transaction
from django.test import Client, RequestFactory
from hypothesis import given
from hypothesis import strategies as st

from hostruntime.host.logs import CONTINUATION_PREFIX, LineFormatter, redact_secrets
from orkestr_console.accounts.models import Team, User
from orkestr_console.runner.postgres import Cluster
from sandboxes_app.models import Sandbox

TREE = Path(__file__).resolve().parents[2]
FORGED = "2026-01-01 00:00:00,000 ERROR root: all is lost"
HOSTILE = (
    f"a\n{FORGED}\r\n{FORGED}\x1b[31mred\x1b]0;title\x07\x9b2J\x85{FORGED}\u2028{FORGED}\u202e\x00"
)
STEERS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]")
RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [\w.-]+: ")


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the program's own formatter makes of everything that is logged."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter())
    logging.root.addHandler(handler)
    yield stream
    logging.root.removeHandler(handler)


def is_honest(log: str) -> None:
    """Each line is a record's first or says that it is not; no line is the one that was forged."""
    assert "all is lost" in log, "it was not logged: no proof"
    assert not STEERS.search(log)
    for line in log.split("\n")[:-1]:
        assert RECORD.match(line) or line.startswith(CONTINUATION_PREFIX), line
        assert not line.startswith("2026-01-01")


def test_a_message_is_one_line(written: io.StringIO) -> None:
    logging.getLogger("x").error("no %s", HOSTILE)
    logging.getLogger(f"x.{HOSTILE[:1]}").warning(HOSTILE)
    is_honest(written.getvalue())
    assert len(written.getvalue().splitlines()) == 2
    assert r"a\n2026" in written.getvalue()


def test_a_traceback_is_the_rest_of_its_record(written: io.StringIO) -> None:
    try:
        raise RuntimeError(HOSTILE) from ValueError(HOSTILE)
    except RuntimeError:
        logging.getLogger("x").exception("failed", stack_info=True)
    log = written.getvalue()
    is_honest(log)
    assert "Traceback (most recent call last)" in log
    assert len(log.splitlines()) > 10


@given(st.text())
def test_whatever_is_logged(text: str) -> None:
    record = logging.LogRecord("x", logging.ERROR, "", 0, "%s", (text,), None)
    assert len(LineFormatter().format(record).splitlines()) == 1


def test_a_defect_is_logged_with_the_id_that_its_page_shows(
    written: io.StringIO, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the page says nothing of it. Before, no log had it at all."""

    def broken(*_: object) -> None:
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr("orkestr_console.console.usage_views.usage.month", broken)
    browser = Client(raise_request_exception=False)
    browser.force_login(alice)
    answer = browser.get("/team/usage/", headers={"X-Request-Id": "chosen-by-a-proxy"})
    assert answer.status_code == 500
    assert "Request <code>chosen-by-a-proxy</code>" in answer.content.decode()
    assert "all is lost" not in answer.content.decode()
    log = written.getvalue()
    is_honest(log)
    assert "Internal Server Error: /team/usage/ [chosen-by-a-proxy]" in log


@pytest.mark.parametrize(
    "given_id",
    ["a b", "x", "a\x1b[31mbcdefgh", "<script>x55z</script>", "a" * 65, "\u202eabcdefgh"],
)
def test_a_request_id_is_one_or_is_replaced(db: None, given_id: str) -> None:
    answer = Client().get("/healthz", headers={"X-Request-Id": given_id})
    assert re.fullmatch(r"req_[0-9A-Z]{26}", answer.headers["X-Request-Id"])


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Not Found: /join/s3cretpart/", "Not Found: /join/***/"),
        ("POST http://x:8000/join/s3cretpart HTTP", "POST http://x:8000/join/*** HTTP"),
        ("next=/join/s3cretpart/&a=b", "next=/join/***/&a=b"),
        ("next=%2Fjoin%2Fs3cretpart%2F", "next=%2Fjoin%2F***%2F"),
        (f"ork_{'a' * 12}_{'s3cretpart' * 4}abcd", f"ork_{'a' * 12}_***"),
        ("Authorization: Bearer s3cretpart", "Authorization: Bearer ***"),
        ("authorization: basic s3cretpart=", "authorization: basic ***"),
        ("postgres://orkestr:s3cretpart@db/x", "postgres://orkestr:***@db/x"),
    ],
)
def test_a_secret_of_an_address_is_left_out(text: str, kept: str) -> None:
    assert redact_secrets(text) == kept
    record = logging.LogRecord("x", logging.ERROR, "", 0, "%s", (text,), None)
    assert "s3cretpart" not in LineFormatter().format(record)


def test_of_a_row_that_is_refused_no_value_is_logged(
    written: io.StringIO, alice: User, team: Team
) -> None:
    """PostgreSQL quotes it whole, and the traceback quotes PostgreSQL."""
    secret = "hunter2\nhunter2-of-the-environment"
    try:
        with transaction.atomic():
            Sandbox.objects.create(team=team, env={"KEY": secret}, error_message=secret)
    except IntegrityError as error:
        assert "hunter2" in str(error), "it is not quoted: no proof"
        logging.getLogger("x").exception("failed: %s", error)
    assert "violates not-null constraint" in written.getvalue()
    assert "hunter2" not in written.getvalue()


def test_a_failed_joining_keeps_its_secret(written: io.StringIO) -> None:
    request = RequestFactory().post("/join/s3cretpart/")
    try:
        raise RuntimeError(f"no such thing at {request.path}")
    except RuntimeError:
        logging.getLogger("django.request").exception(
            "Internal Server Error: %s", request.path, extra={"request": request}
        )
    assert "/join/***/" in written.getvalue()
    assert "s3cretpart" not in written.getvalue()


def test_nothing_writes_past_the_formatter() -> None:
    """A logger with a handler of its own would write as it likes: Django's and the queue's do."""
    import django_q.tasks  # noqa: F401 - it sets up its logger when it is imported

    loggers = [x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)]
    assert {"django", "django-q", "axes.handlers.database"} <= {x.name for x in loggers}
    # A library's way not to write (logging.NullHandler).
    silent = logging.NullHandler
    assert [x.name for x in loggers if any(not isinstance(h, silent) for h in x.handlers)] == []
    assert [h for h in logging.root.handlers if isinstance(h.formatter, LineFormatter)]


def test_the_agent_writes_the_same_way(tmp_path: Path) -> None:
    said = f"""
import logging
from hostruntime.agent.__main__ import main
main(["--state-dir", {str(tmp_path / "none")!r}, "teardown"])
logging.getLogger("hostruntime.x").error({HOSTILE!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", said], cwd=TREE, capture_output=True, text=True, check=True
    )
    is_honest(done.stderr)


def test_the_database_logs_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed statement has its values in it, and by default PostgreSQL logs both."""
    monkeypatch.setattr(
        "orkestr_console.runner.postgres.server_programs", lambda _: Path("/usr/lib/postgresql/bin")
    )
    argv = Cluster(tmp_path / "pg", tmp_path / "run").command()
    assert "--log_min_error_statement=panic" in argv
    assert "--log_error_verbosity=terse" in argv
