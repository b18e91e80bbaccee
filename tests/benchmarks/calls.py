"""What API calls take, alone and concurrently, beside isolated commands without a server.

The contestants take turns on one installation, so that whatever else the machine does affects all
of them.  Ratios are to the median of bwrap(1), where it is installed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import httpx
import psycopg

from tests.benchmarks.peers import peers
from tests.benchmarks.report import Report
from tests.stack import Stack

BASE = "debian-12"
NODE, NODE_COMMAND = "node-22", "node -v"
CLIENTS = (1, 8, 32)
RATE_SECONDS = 10.0
# Between the beginnings of creates in the staggered way of counting.
STAGGER_SECONDS = 0.1


class Calls:
    """The calls that are measured, each by one client on one connection."""

    def __init__(self, stack: Stack, template: str = BASE) -> None:
        self._client = stack.client()
        self._anonymous = httpx.Client(base_url=stack.url, timeout=60, trust_env=False)
        self._template = template
        self.sandbox = ""

    def __enter__(self) -> Calls:
        self.sandbox = self.create()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._client.close()
        self._anonymous.close()

    def create(self) -> str:
        """A running sandbox's id."""
        body = {"template": self._template, "network": "off"}
        answer = self._client.post("/v1/sandboxes", json=body)
        return str(answer.raise_for_status().json()["id"])

    def execute(self, sandbox: str | None = None, command: str = "true") -> None:
        """One command, by default one that does nothing."""
        path = f"/v1/sandboxes/{sandbox or self.sandbox}/exec"
        answer = self._client.post(path, json={"command": command})
        assert answer.json()["exit_code"] == 0, answer.text

    def end(self, sandbox: str | None = None) -> None:
        """Terminate one, or the client's own."""
        self._client.delete(f"/v1/sandboxes/{sandbox or self.sandbox}").raise_for_status()

    def read(self) -> None:
        """A sandbox's row."""
        self._client.get(f"/v1/sandboxes/{self.sandbox}").raise_for_status()

    def miss(self) -> None:
        """An address that there is not."""
        assert self._client.get("/v1/nothing").status_code == 404

    def redirect(self) -> None:
        """A page that wants to be signed in for."""
        assert self._anonymous.get("/templates/").status_code == 302

    def first_answer(self, command: str = "true") -> str:
        """Create, and one command's answer."""
        sandbox = self.create()
        self.execute(sandbox, command)
        return sandbox

    def create_and_end(self) -> None:
        """One sandbox from its beginning to its end."""
        self.end(self.create())


type Times = dict[str, list[float]]


def take_turns(contestants: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """The times of each contestant in milliseconds."""
    times: Times = {name: [] for name in contestants}
    for number in range(-2, rounds):
        for name, contestant in contestants.items():
            began = time.perf_counter()
            contestant()
            # The first rounds fill caches that every later one profits from.
            if number >= 0:
                times[name].append((time.perf_counter() - began) * 1000)
    return times


def measure_alone(stack: Stack, report: Report, title: str, rounds: int) -> None:
    """Each call and each peer by itself, taking turns."""
    with Calls(stack) as calls, peers(stack.layout.state_dir / "images" / BASE / "tree") as others:
        made: list[str] = []
        contestants: dict[str, Callable[[], object]] = {
            **others,
            "a 404": calls.miss,
            "a redirect to the sign-in page": calls.redirect,
            "`GET /v1/sandboxes/{id}`": calls.read,
            "`exec true`": calls.execute,
            "create": lambda: made.append(calls.create()),
            "the first command in it": lambda: calls.execute(made[-1]),
            "delete": lambda: calls.end(made.pop()),
            "create → first command's answer": lambda: made.append(calls.first_answer()),
            "delete, once more": lambda: calls.end(made.pop()),
        }
        times = take_turns(contestants, rounds)
    report.table(title, times)


def measure_images(stack: Stack, report: Report, large: str, title: str, rounds: int) -> None:
    """Create and delete, from a base and from a template that is larger."""
    clients = {BASE: Calls(stack), title: Calls(stack, large)}
    times = take_turns({name: calls.create_and_end for name, calls in clients.items()}, rounds)
    report.table("Create and delete, by the size of the image", times)


def measure_rates(stack: Stack, report: Report) -> None:
    """How many calls a second several clients get answered together."""
    report.say("\n## Several clients: answers a second\n")
    report.say(f"| | {' | '.join(f'{number} clients' for number in CLIENTS)} |")
    report.say(f"|---|{'---:|' * len(CLIENTS)}")
    kinds: dict[str, Callable[[Calls], object]] = {
        "`GET /v1/sandboxes/{id}`": Calls.read,
        "`exec true`": Calls.execute,
        "create and delete": Calls.create_and_end,
    }
    for name, call in kinds.items():
        rates = [rate(stack, call, number) for number in CLIENTS]
        report.say(f"| {name} | {' | '.join(f'{each:.1f}' for each in rates)} |")


def rate(stack: Stack, call: Callable[[Calls], object], clients: int) -> float:
    """Calls a second; each client has a sandbox and a connection of its own."""
    until = threading.Event()

    def work(calls: Calls) -> int:
        count = 0
        while not until.is_set():
            call(calls)
            count += 1
        return count

    everybody = [Calls(stack).__enter__() for _ in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        counts = [pool.submit(work, calls) for calls in everybody]
        time.sleep(RATE_SECONDS)
        until.set()
        total = sum(each.result() for each in counts)
        took = time.perf_counter() - began
    for calls in everybody:
        calls.__exit__()
    return total / took


def measure_starts(stack: Stack, report: Report, number: int) -> None:
    """Create to the answer of ``node -v``: one after the other, staggered, and all at once."""
    calls = Calls(stack, NODE)

    def start(delay: float) -> tuple[str, float]:
        time.sleep(delay)
        began = time.perf_counter()
        sandbox = calls.first_answer(NODE_COMMAND)
        return sandbox, (time.perf_counter() - began) * 1000

    times: Times = {}
    ways = {
        "one after the other": (1, [0.0] * number),
        f"one each {STAGGER_SECONDS:.1f} s": (
            number,
            [index * STAGGER_SECONDS for index in range(number)],
        ),
        "all at once": (number, [0.0] * number),
    }
    for name, (at_once, delays) in ways.items():
        with ThreadPoolExecutor(at_once) as pool:
            began = time.perf_counter()
            done = list(pool.map(start, delays))
            took = time.perf_counter() - began
            list(pool.map(calls.end, [sandbox for sandbox, _ in done]))
        times[f"{name}: {number} in {took:.1f} s"] = [each for _, each in done]
    report.table(f"{number} sandboxes, create → `{NODE_COMMAND}`", times)


def measure_beside(stack: Stack, report: Report, title: str, rounds: int) -> None:
    """The calls that must not get slower, as things are now."""
    with Calls(stack) as calls:
        made: list[str] = []
        contestants: dict[str, Callable[[], object]] = {
            "`GET /v1/sandboxes/{id}`": calls.read,
            "`exec true`": calls.execute,
            "create": lambda: made.append(calls.create()),
            "delete": lambda: calls.end(made.pop()),
        }
        report.table(title, take_turns(contestants, rounds))


def wear(stack: Stack, commands: int) -> None:
    """Run so many commands in one sandbox."""
    with Calls(stack) as calls:
        for _ in range(commands):
            calls.execute()


def crowd(stack: Stack, number: int) -> list[str]:
    """Create so many sandboxes; their ids."""
    calls = Calls(stack)
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda _: calls.create(), range(number)))


def disperse(stack: Stack, sandboxes: list[str]) -> None:
    """Delete sandboxes."""
    calls = Calls(stack)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(calls.end, sandboxes))


def lift_limits(stack: Stack) -> None:
    """Let one token do as much as the machine can: plans are there to prevent just that."""
    names = (
        *("api_requests_per_minute", "max_templates"),
        *("max_concurrent_sandboxes", "max_concurrent_commands"),
    )
    settings = ", ".join(f"{name} = 1000000" for name in names)
    with psycopg.connect(stack.layout.environment()["DATABASE_URL"]) as database:
        database.execute(f"UPDATE accounts_plan SET {settings}".encode())
