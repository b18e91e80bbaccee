"""Databases with data in them, and what works off a queue."""

from __future__ import annotations

from tests.recipes.stacks.stack import Stack, apt, file, once

_ROWS = "insert into sold values (1, 'tea', 19), (2, 'coffee', 23)"

DATABASES = (
    Stack(
        "postgresql",
        "debian-12",
        (
            apt("postgresql postgresql-contrib"),
            'service postgresql start && su postgres -c "psql -v ON_ERROR_STOP=1 '
            "-c 'create extension pg_trgm' "
            "-c 'create table sold (id int primary key, what text, price int)' "
            f'-c \\"{_ROWS}\\"" && service postgresql stop',
        ),
        (
            (
                "service postgresql start && su postgres -c "
                "\"psql -tAc 'select sum(price) from sold' "
                '-c \\"select what from sold where similarity(what, \'cofee\') > 0.4\\""',
                "42\ncoffee",
            ),
        ),
    ),
    Stack(
        "mariadb",
        "debian-12",
        (
            apt("mariadb-server"),
            'service mariadb start && mariadb -e "create database shop; use shop; '
            f'create table sold (id int primary key, what text, price int); {_ROWS}" '
            "&& service mariadb stop",
        ),
        (
            (
                "service mariadb start >/dev/null && "
                "mariadb shop -Ne 'select sum(price) from sold'",
                "42",
            ),
        ),
    ),
    Stack(
        "sqlite",
        "python-3.12",
        (
            apt("sqlite3"),
            f'sqlite3 /opt/shop.db "create table sold (id, what, price); {_ROWS}; '
            "create virtual table words using fts5(text); "
            "insert into words values ('a cup of tea');\"",
        ),
        (
            ("sqlite3 /opt/shop.db 'select sum(price) from sold'", "42"),
            (
                'python -c \'import sqlite3; print(sqlite3.connect("/opt/shop.db").execute('
                '"select text from words where words match ?", ["tea"]).fetchall())\'',
                "a cup of tea",
            ),
        ),
    ),
    Stack(
        "celery-and-redis",
        "python-3.12",
        (
            apt("redis-server"),
            "pip install 'celery[redis]' packaging",
            file(
                "/opt/app/work.py",
                """\
from celery import Celery

app = Celery("work", broker="redis://localhost", backend="redis://localhost")


@app.task
def add(a: int, b: int) -> int:
    return a + b
""",
            ),
            "service redis-server start && redis-cli set greeting baked && redis-cli save && "
            "service redis-server stop",
        ),
        (
            (
                "service redis-server start; "
                + once("redis-cli ping >/dev/null")
                + "; redis-cli get greeting",
                "baked",
            ),
            (
                "cd /opt/app && (celery -A work worker -c 1 >/root/worker.log 2>&1 &) && "
                "python -c 'import work; print(work.add.delay(19, 23).get(timeout=100))'",
                "42",
            ),
        ),
    ),
)
