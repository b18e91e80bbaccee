"""What an installation is brought to be doing before it is struck, by looking, never by sleeping.

Each moment is a function that begins something in the struck team's name and returns a
:class:`Scene` as soon as it is seen to be under way.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import httpx

from tests.clients.making import Templates
from tests.faults.calls import LONGEST_CALL, Call, kind_of, streamed
from tests.faults.installation import BASE, Installation

REACH_SECONDS = 60.0
LOOK_SECONDS = 0.003
BURST = 4
TOGGLED = 4
MOST_TIMES = 10
UPLOAD_BYTES = 8_000_000
DISK_BYTES = 200_000_000
LINES = "for i in $(seq 80); do echo line $i; sleep 0.1; done"
# Many small files, as packages are, so that what is made of them takes a moment.
FILES = "mkdir /opt/many && cd /opt/many && seq 15000 | split -l 1 -a 5"

type Client = httpx.Client


class Missed(Exception):  # noqa: N818 - what happened
    """The moment was over before it was seen."""


@dataclass
class Scene:
    """Something under way. ``subjects`` own its containers; ``calls`` are what clients wait for.

    ``still`` says whether it is still under way; ``go_on`` lets a client go on that waits for the
    strike; ``after`` says what is wrong with what came of it, once all is over.
    """

    subjects: list[str]
    calls: list[Call] = field(default_factory=list)
    still: Callable[[], bool] = lambda: True
    go_on: Callable[[], None] = lambda: None
    after: Callable[[], list[str]] = list


type Reach = Callable[[Installation, Client], Scene]


def until(condition: Callable[[], bool], over: Callable[[], bool] = lambda: False) -> None:
    """Look again and again until ``condition()``; raises Missed when it is ``over()`` before."""
    deadline = time.monotonic() + REACH_SECONDS
    while not condition():
        if over() or time.monotonic() > deadline:
            raise Missed
        time.sleep(LOOK_SECONDS)


def idle(installation: Installation, client: Client) -> Scene:
    """One sandbox runs, and nobody asks for anything."""
    return Scene([installation.boot(client)])


# Builds -----------------------------------------------------------------------------------------


def step(installation: Installation, client: Client) -> Scene:
    """A build's step runs."""
    return build(installation, client, ["sleep 6; echo done"], "step_started", "step_finished")


def capture(installation: Installation, client: Client) -> Scene:
    """The steps are over, and the image is being made."""
    return build(installation, client, [FILES], "step_finished", "scrub")


def scrub(installation: Installation, client: Client) -> Scene:
    """The image has been scrubbed, and is being counted."""
    return build(installation, client, [FILES], "scrub", "capture")


def publish(installation: Installation, client: Client) -> Scene:
    """The image is whole; it is described, written out, and gets its name."""
    return build(installation, client, [FILES], "capture", "published")


def build(
    installation: Installation, client: Client, recipe: list[str], since: str, before: str
) -> Scene:
    """A build that has told the event ``since`` and not yet ``before``, and who follows it."""
    template = Templates(client).create(BASE, *recipe)
    image = installation.image_of(template)
    log = installation.stack.layout.state_dir / "builds" / image / "events.ndjson"

    def told(kind: str) -> bool:
        return log.exists() and f'"kind": "{kind}"' in log.read_text()

    until(lambda: told(since), lambda: told(before) or told("failed"))
    follow = Call("build", lambda: followed(client, template))
    return Scene([image], [follow], still=lambda: not told(before))


def followed(client: Client, template: str) -> tuple[str, str]:
    """How a build ended for somebody who asks for it again and again, whatever answers."""
    deadline = time.monotonic() + LONGEST_CALL
    while time.monotonic() < deadline:
        try:
            answer = client.get(f"/v1/templates/{template}")
        except httpx.HTTPError:
            # Whether that was promised is what the probes find out.
            answer = None
        if answer is not None and answer.is_success and answer.json()["status"] != "building":
            return ended(answer.json())
        if answer is not None and kind_of(answer)[0] == "wrong":
            return kind_of(answer)
        time.sleep(0.3)
    return "wrong", f"still building after {LONGEST_CALL:.0f} s"


def ended(record: dict[str, str]) -> tuple[str, str]:
    """What an ended build is: a failure has a code and a sentence, and is no defect."""
    if record["status"] == "ready":
        return "ok", "ready"
    told = f"{record['error_code']}: {record['error_message'][:200]}"
    defect = record["error_code"] in {"", "internal"} or not record["error_message"]
    return "wrong" if defect else "refused", told


# Sandboxes --------------------------------------------------------------------------------------


def creates(installation: Installation, client: Client) -> Scene:
    """A burst of creates, of which some have been answered and others begun."""
    before = set(ids(installation))
    struck = threading.Event()
    ask = partial(client.post, "/v1/sandboxes", json={"template": BASE})
    calls = [Call("create", partial(again_and_again, ask, struck)) for _ in range(BURST)]

    def new() -> dict[str, str]:
        return {one: status for one, status in ids(installation).items() if one not in before}

    until(lambda: {"starting", "running"} <= set(new().values()), all_answered(calls))
    found = sorted(new().items(), key=lambda item: item[1] != "starting")
    return Scene([one for one, _ in found], calls, go_on=struck.set)


def again_and_again(ask: Callable[[], httpx.Response], struck: threading.Event) -> httpx.Response:
    """Ask until the strike, or the first refusal, or often enough; the last answer."""
    for _ in range(MOST_TIMES):
        answer = ask()
        if struck.is_set() or not answer.is_success:
            break
    return answer


def all_answered(calls: list[Call]) -> Callable[[], bool]:
    """Whether nobody waits any more."""
    return lambda: all(call.answer for call in calls)


def ids(installation: Installation) -> dict[str, str]:
    """Every sandbox's status, by its id."""
    return dict(installation.rows("SELECT id, status FROM sandboxes_app_sandbox"))


def stream(installation: Installation, client: Client) -> Scene:
    """A command prints, and a client reads it."""
    sandbox, reached = installation.boot(client), threading.Event()
    call = Call("stream", lambda: streamed(client, sandbox, LINES, reached, 5))
    until(reached.is_set, lambda: call.answer is not None)
    return Scene([sandbox], [call], still=lambda: call.answer is None)


def upload(installation: Installation, client: Client) -> Scene:
    """Half of a large file has been sent; the other half is after the strike."""
    sandbox, half, go = installation.boot(client), threading.Event(), threading.Event()
    old, new = b"old", bytes(UPLOAD_BYTES)
    address = f"/v1/sandboxes/{sandbox}/files"

    def body(content: bytes, *, pause: bool) -> Iterator[bytes]:
        text = base64.b64encode(content).decode()
        data = json.dumps({"path": "/workspace/sent", "content": text}).encode()
        middle = len(data) // 2
        yield data[:middle]
        half.set()
        if pause:
            go.wait(LONGEST_CALL)
        yield data[middle:]

    def send(content: bytes, *, pause: bool) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return client.post(address, content=body(content, pause=pause), headers=headers)

    answer = send(old, pause=False)
    assert answer.is_success, answer.text
    half.clear()
    call = Call("upload", lambda: send(new, pause=True))
    until(half.is_set, lambda: call.answer is not None)

    def after() -> list[str]:
        return torn(client, sandbox, call, {len(old), len(new)})

    return Scene([sandbox], [call], go_on=go.set, after=after)


def torn(client: Client, sandbox: str, call: Call, sizes: set[int]) -> list[str]:
    """What is wrong with a file that must be there whole, as it was or as it was to be."""
    command = {"command": "stat -c %s /workspace/sent; ls -A /workspace | grep -c sent"}
    answer = client.post(f"/v1/sandboxes/{sandbox}/exec", json=command)
    if not answer.is_success:
        return []
    size, files = map(int, answer.json()["stdout"].split())
    whole = call.answer is not None and call.answer.kind == "ok"
    if size not in sizes or (whole and size != max(sizes)) or files != 1:
        return [f"the uploaded file has {size} bytes, and {files - 1} others are beside it"]
    return []


def snapshot(installation: Installation, client: Client) -> Scene:
    """The disk of a sandbox is being copied."""
    sandbox = installation.boot(client)
    installation.run(client, sandbox, f"head -c {DISK_BYTES} /dev/urandom > /root/big; sync")
    place = installation.stack.layout.state_dir / "snapshots"
    call = Call("snapshot", lambda: client.post(f"/v1/sandboxes/{sandbox}/snapshots", json={}))

    def copying() -> bool:
        return any((one / "disk.ext4").exists() for one in place.glob(".snap*"))

    until(copying, lambda: call.answer is not None)
    return Scene([sandbox], [call], still=lambda: call.answer is None)


def pause(installation: Installation, client: Client) -> Scene:
    """Sandboxes are paused and resumed again and again, and one is on its way just now."""
    sandboxes = [installation.boot(client) for _ in range(TOGGLED)]
    struck = threading.Event()

    def toggle(sandbox: str) -> httpx.Response:
        paused = client.post(f"/v1/sandboxes/{sandbox}/pause")
        if struck.is_set() or not paused.is_success:
            return paused
        return client.post(f"/v1/sandboxes/{sandbox}/resume")

    asks = [partial(again_and_again, partial(toggle, one), struck) for one in sandboxes]
    calls = [Call("pause", ask) for ask in asks]
    on_the_way = {"pausing", "resuming"}
    until(
        lambda: bool(on_the_way & {ids(installation)[one] for one in sandboxes}),
        all_answered(calls),
    )
    return Scene(sandboxes, calls, go_on=struck.set)


def delete(installation: Installation, client: Client) -> Scene:
    """Sandboxes are made and deleted, and one has ended by its row but not yet on the host."""
    before = set(ids(installation))
    # Whose container can be struck, if those under way have ended by then.
    bystander = installation.boot(client)
    struck = threading.Event()
    disks = installation.stack.layout.state_dir / "disks"
    found: list[str] = []

    def make_and_delete() -> httpx.Response:
        made = client.post("/v1/sandboxes", json={"template": BASE})
        if struck.is_set() or not made.is_success:
            return made
        return client.delete(f"/v1/sandboxes/{made.json()['id']}")

    calls = [
        Call("delete", partial(again_and_again, make_and_delete, struck)) for _ in range(BURST)
    ]

    def one_is_half_gone() -> bool:
        ended = [
            one
            for one, status in ids(installation).items()
            if status == "terminated" and one not in before
        ]
        found[:] = [one for one in ended if (disks / f"{one}.img").exists()]
        return bool(found)

    until(one_is_half_gone, all_answered(calls))
    running = [one for one, status in ids(installation).items() if status == "running"]
    subjects = [one for one in running if one not in {*before, bystander}]
    return Scene([*subjects, bystander], calls, go_on=struck.set)


MOMENTS: dict[str, Reach] = {
    reach.__name__: reach
    for reach in (
        *(idle, step, capture, scrub, publish, creates, stream, upload, snapshot, pause, delete),
    )
}
