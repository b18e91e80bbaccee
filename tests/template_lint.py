"""How Django templates are written: `python -m tests.template_lint [--fix]`, a part of `make lint`.

djade formats what stands inside template tags. Here: no line over 120 characters; a line is two
spaces deeper than the one that opened what it stands in; elements that follow each other stand on
lines of their own. What `pre` and `textarea` hold is left as it is. ``--fix`` indents anew and lets
djade rewrite; where lines end is for people.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]
APPS = ("orkestr_console", "sandboxes_app", "templates_app")
DJADE = (str(Path(sys.executable).with_name("djade")), "--target-version", "6.1")

MAX_LINE_LENGTH = 120
STEP = 2
BLOCKS = {"if", "for", "with", "block", "partialdef"}
BRANCHES = {"elif", "else", "empty"}
VOID = {"br", "hr", "img", "input", "link", "meta"}
PREFORMATTED = {"pre", "textarea"}
# What may follow another of its kind on one line: words of a sentence, drawings.
WORDS = {"a", "b", "bdi", "code", "i", "kbd", "mark", "small", "span", "time", "use"}

TAG = re.compile(r"{%\s*(?P<word>\w+).*?%}|{{.*?}}|{#.*?#}|<(?P<close>/?)(?P<name>[a-zA-Z][\w-]*)")
# An attribute's value may have a template tag with quotes of its own.
REST_OF_TAG = re.compile(
    r"""(?:{%.*?%}|{{.*?}}|"(?:{%.*?%}|{{.*?}}|[^"])*"|'(?:{%.*?%}|{{.*?}}|[^'])*'|[^>"'])*>""",
    re.DOTALL,
)


@dataclass(frozen=True)
class Token:
    """A template tag or an element's tag: ``kind`` is open, close, branch or other."""

    start: int
    end: int
    kind: str
    name: str


def tokens(text: str) -> Iterator[Token]:
    """The tags of a template, in order; none of what is left as it is written."""
    at = 0
    while found := TAG.search(text, at):
        at = found.end()
        if found["word"]:
            yield Token(found.start(), at, *_of_template(found["word"]))
        elif found["name"]:
            rest = REST_OF_TAG.match(text, at)
            if rest is None:
                raise ValueError(f"the tag {found[0]} has no end")
            at, name = rest.end(), found["name"].lower()
            alone = name in VOID or rest[0].endswith("/>")
            yield Token(
                found.start(), at, "close" if found["close"] else "other" if alone else "open", name
            )
            if name in PREFORMATTED and not found["close"]:
                at = text.index(f"</{name}", at)


def _of_template(word: str) -> tuple[str, str]:
    if word.startswith("end"):
        return "close", word.removeprefix("end")
    return ("open" if word in BLOCKS else "branch" if word in BRANCHES else "other"), word


def indent(text: str) -> str:
    """A template with its lines indented as they should be. Raises ``ValueError`` if ill nested."""
    waiting = list(tokens(text))
    open_ones: list[tuple[str, int]] = []  # what is open, and the indentation of its line
    inside: tuple[int, int] | None = None  # a tag of several lines: where it ends, and how deep
    written_until, lines, start = 0, [], 0
    for line in text.splitlines(keepends=True):
        end, bare = start + len(line), line.lstrip(" ")
        first = next((one for one in waiting if one.start == end - len(bare)), None)
        if start < written_until:
            depth, bare = 0, line
        elif inside and start < inside[0]:
            depth = inside[1] + STEP
        elif first and first.kind in ("close", "branch") and open_ones:
            depth = open_ones[-1][1]
        else:
            depth = open_ones[-1][1] + STEP if open_ones else 0
        lines.append(bare if bare == "\n" else " " * depth + bare)
        while waiting and waiting[0].start < end:
            token = waiting.pop(0)
            if token.end > end:
                inside = token.end, depth
            if token.name in PREFORMATTED and token.kind == "open":
                written_until = text.index(f"</{token.name}", token.end)
            _follow(open_ones, token, depth, token is first)
        start = end
    if open_ones:
        raise ValueError(f"{open_ones[-1][0]} is never closed")
    return "".join(lines)


def _follow(open_ones: list[tuple[str, int]], token: Token, depth: int, is_first: bool) -> None:
    if token.kind == "open":
        open_ones.append((token.name, depth))
    elif token.kind == "close":
        if not open_ones or open_ones[-1][0] != token.name:
            raise ValueError(f"the end of {token.name} closes {open_ones[-1:] or 'nothing'}")
        open_ones.pop()
    elif token.kind == "branch" and is_first:
        open_ones[-1] = (open_ones[-1][0], depth)


def complaints(text: str) -> list[str]:
    """What is wrong with a template, each as ``12: line has 131 characters``."""
    try:
        right = indent(text)
    except ValueError as error:
        return [f"1: {error}"]
    wrong = []
    for number, (line, wanted) in enumerate(
        zip(text.split("\n"), right.split("\n"), strict=True), 1
    ):
        if len(line) > MAX_LINE_LENGTH:
            wrong.append(
                f"{number}: the line has {len(line)} characters; at most {MAX_LINE_LENGTH}"
            )
        if line != wanted:
            wrong.append(f"{number}: indent by {len(wanted) - len(wanted.lstrip())}")
    for first, second in adjacent_tokens(text):
        number = text.count("\n", 0, second.start) + 1
        wrong.append(f"{number}: begin a line with {second.name}, which follows {first.name}")
    return wrong


def adjacent_tokens(text: str) -> Iterator[tuple[Token, Token]]:
    """Elements that begin on the line on which another has just ended."""
    found = [one for one in tokens(text) if text.startswith("<", one.start)]
    for first, second in pairwise(found):
        ended = first.kind in ("close", "other") and second.kind in ("open", "other")
        between = text[first.end : second.start]
        if ended and not between.strip(" ") and not {first.name, second.name} <= WORDS:
            yield first, second


def main(arguments: Sequence[str]) -> int:
    """Exit status 0 when every template is as it should be."""
    paths = sorted(path for app in APPS for path in (TREE / app).rglob("*.html"))
    fixing = "--fix" in arguments
    if fixing:
        for path in paths:
            path.write_text(indent(path.read_text()))
    wrong = [
        f"{path.relative_to(TREE)}:{complaint}"
        for path in paths
        for complaint in complaints(path.read_text())
    ]
    print("\n".join([*wrong, f"{len(paths)} templates, {len(wrong)} complaints"]))  # noqa: T201
    djade = subprocess.run([*DJADE, *([] if fixing else ["--check"]), *map(str, paths)])
    return 1 if wrong or (djade.returncode and not fixing) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
