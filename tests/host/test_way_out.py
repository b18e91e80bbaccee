"""Programs that begin with an environment of their own still find the way out, and keep to it.

A registry of the tests' own, in a network namespace, is asked through everything that leaves the
environment of the command behind.  The images are real: what `sudo`, PAM and a shell make of
what they are lent is theirs to say.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from hostruntime.build.report import RefusedHost
from hostruntime.container.authorities import certificates
from hostruntime.host.paths import StatePaths
from hostruntime.host.run import run
from hostruntime.image.store import ImageManifest, ImageStore
from hostruntime.wire.builds import StartBuild
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import CreateSandbox
from tests.host.agent import Agent, an_agent
from tests.host.client import HostClient
from tests.host.network import world as world
from tests.host.topology import INTERNET, RESOLVER, SITE, World

pytestmark = pytest.mark.host

URL = f"https://{SITE}"
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
PATH = "PATH=/usr/local/bin:/usr/bin:/bin"
# Named by hand: what is refused by name is never asked for.
UNLISTED = "nowhere.invalid"
# Its parent is the registry's.
POM = f"""\
<project>
  <modelVersion>4.0.0</modelVersion>
  <parent><groupId>hello</groupId><artifactId>parent</artifactId><version>1</version></parent>
  <artifactId>app</artifactId>
  <repositories><repository><id>site</id><url>{URL}/maven</url></repository></repositories>
</project>
"""
PARENT = """\
<project>
  <modelVersion>4.0.0</modelVersion>
  <groupId>hello</groupId><artifactId>parent</artifactId><version>1</version>
  <packaging>pom</packaging>
</project>
"""
TOOLS = (
    "apt-get update && apt-get install -y --no-install-recommends sudo wget git cron",
    "useradd --create-home --shell /bin/bash app",
)
JAVA = (
    "apt-get install -y --no-install-recommends maven default-jre-headless",
    f"mkdir /opt/app && cat >/opt/app/pom.xml <<'END'\n{POM}END",
)
IMAGES = {
    "img_way_python": ("python-3.12-bare", TOOLS),
    "img_way_node": ("node-22", TOOLS),
    "img_way_java": ("debian-12", (*TOOLS, *JAVA)),
}
WAYS = {
    "exec": "sh -c '{}'",
    "sudo": "sudo -u app -H sh -c '{}'",
    "su -": "su - app -c '{}'",
    "env -i": f"env -i {PATH} HOME=/root sh -c '{{}}'",
    "login": "env -i HOME=/root bash -l -c '{}'",
    "cron": (
        f"cat >/etc/cron.d/ask <<'END'\n{PATH}\n"
        "@reboot root ({}) >/root/said 2>&1; touch /root/done\nEND\n"
        "service cron start >/dev/null 2>&1 && until test -e /root/done; do sleep 0.1; done; "
        "cat /root/said"
    ),
    "service": (
        "cat >/etc/init.d/ask <<'END' && chmod 755 /etc/init.d/ask && service ask start\n"
        "#!/bin/sh\nset -eu\n. /lib/lsb/init-functions\nHOME=/root\n{}\nEND\n"
    ),
}
ASK = {
    "git": f"git ls-remote {URL}/repo.git HEAD | cut -c 41-",
    "git by ssh": f"git ls-remote git@{SITE}:repo.git HEAD | cut -c 41-",
    "git by ssh://": f"git ls-remote ssh://git@{SITE}/repo.git HEAD | cut -c 41-",
    "wget": f"wget -qO- {URL}/file",
    "pip": "cd $(mktemp -d) && pip download -q --no-deps hello && ls",
    "npm": f"npm view --registry={URL}/npm/ hello version",
    "curl": f"curl -s {URL}/file",
    "python": (
        'python3 -c "import urllib.request as u; '
        f'print(u.urlopen(\\"{URL}/file\\").read().decode())"'
    ),
    "maven": "mvn -B -q -f /opt/app validate >/tmp/$$ 2>&1 && echo served || tail -n 5 /tmp/$$",
}
IMAGE = {"npm": "img_way_node", "maven": "img_way_java"}
# These have no file of their own to be told in.
BY_ENVIRONMENT = {"curl", "python", "maven"}
SAID = {
    "git": "\tHEAD",
    "git by ssh": "\tHEAD",
    "git by ssh://": "\tHEAD",
    "wget": "served",
    "pip": "hello-1.0-py3-none-any.whl",
    "npm": "1.0.0",
    "curl": "served",
    "python": "served",
    "maven": "served",
}
NUMBERS = count(1)
Box = Callable[..., str]


@pytest.fixture(scope="module")
def trees(agent: Agent, bases: None) -> Iterator[dict[str, Path]]:
    """Real images with a person in them, made on the agent that reaches the mirrors."""
    made = {image: f"{image}_{time.time_ns():x}" for image in IMAGES}
    for image, (base, recipe) in IMAGES.items():
        built(agent.client, made[image], *recipe, base=base)
    yield {image: agent.state / "images" / name / "tree" for image, name in made.items()}
    for name in made.values():
        agent.client.delete_image(name)


def built(host: HostClient, name: str, *recipe: str, base: str) -> list[dict[str, object]]:
    """Build an image to its end; the events."""
    host.start_build(StartBuild(name, base_image=base, recipe=recipe, network="restricted"))
    events = [{"kind": event.kind, **event.data} for event in host.build_events(name)]
    assert events[-1]["kind"] == "published", events[-5:]
    return events


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry, as files: indexes of pip's, npm's and Maven's, a repository and a file."""
    root = tmp_path_factory.mktemp("site")
    (root / "file").write_text("served\n")
    _wheel(root / "hello-1.0-py3-none-any.whl")
    (root / "simple/hello").mkdir(parents=True)
    (root / "simple/hello/index.html").write_text(
        '<a href="/hello-1.0-py3-none-any.whl">hello-1.0-py3-none-any.whl</a>'
    )
    (root / "npm").mkdir()
    version = {"name": "hello", "version": "1.0.0", "dist": {"tarball": f"{URL}/none.tgz"}}
    document = {"name": "hello", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
    (root / "npm/hello").write_text(json.dumps(document))
    (root / "maven/hello/parent/1").mkdir(parents=True)
    (root / "maven/hello/parent/1/parent-1.pom").write_text(PARENT)
    _repository(root / "repo.git")
    return root


def _wheel(path: Path) -> None:
    info = "hello-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("hello.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: hello\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def _repository(path: Path) -> None:
    person = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a"}
    environment = {**os.environ, **person, "GIT_COMMITTER_EMAIL": "a@b"}
    git = ["git", "-C", str(path)]
    run(["git", "init", "--quiet", "--bare", "--initial-branch=main", str(path)], timeout=10)
    tree = run([*git, "mktree"], timeout=10).text.strip()
    commit = run([*git, "commit-tree", tree, "-m", "x"], env=environment, timeout=10).text.strip()
    run([*git, "update-ref", "refs/heads/main", commit], timeout=10)
    run([*git, "update-server-info"], timeout=10)


@pytest.fixture(scope="module")
def live(
    trees: dict[str, Path], world: World, site: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Agent]:
    """An agent whose outside is the world, which trusts the registry and has its address."""
    world.names[SITE] = [INTERNET]
    world.sites[SITE] = site
    bundle = tmp_path_factory.mktemp("trust") / "bundle.crt"
    own = b"\n".join(certificates(world.certificate.read_bytes()).values())
    bundle.write_bytes(Path(BUNDLE).read_bytes() + own + b"\n")
    # On the file system of the images, which are linked.
    state = Path(
        tempfile.mkdtemp(prefix="test-way-out-", dir=next(iter(trees.values())).parents[3])
    )
    store = ImageStore(StatePaths(state).ensure())
    for name, tree in trees.items():
        staged = store.create_staging(name)
        run(["cp", "-al", str(tree.resolve()), str(staged / "tree")], timeout=120)
        store.publish(staged, ImageManifest(name, "base", None, time.time(), 0, 0, 0))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ORKESTR_DNS", RESOLVER)
        patched.setenv("SSL_CERT_FILE", str(bundle))
        patched.setenv("PIP_INDEX_URL", f"{URL}/simple")
        with an_agent(state) as agent:
            yield agent
    shutil.rmtree(state)


@pytest.fixture
def box(live: Agent) -> Iterator[Box]:
    """Makes sandboxes, on a restricted network unless told otherwise."""
    made: list[str] = []

    def make(image: str, mode: str = "restricted") -> str:
        made.append(f"sbx_way{next(NUMBERS)}")
        listed = [SITE] if mode == "restricted" else None
        live.client.create_sandbox(
            CreateSandbox(
                made[-1], image=image, cpu=1.0, memory_mb=512, network=mode, allow_domains=listed
            )
        )
        return made[-1]

    yield make
    for name in made:
        live.client.delete_sandbox(name)


def says(live: Agent, name: str, command: str) -> str:
    done = live.client.exec(name, Exec(command, cwd="/root", timeout_seconds=60))
    return (done.stdout + done.stderr).decode(errors="replace").strip("\n")


@pytest.mark.parametrize(
    ("tool", "way"),
    [(tool, way) for tool in ASK for way in WAYS if way != "env -i" or tool not in BY_ENVIRONMENT],
)
def test_a_program_finds_the_registry_however_it_was_started(
    live: Agent, box: Box, tool: str, way: str
) -> None:
    name = box(IMAGE.get(tool, "img_way_python"))
    assert says(live, name, WAYS[way].format(ASK[tool])).strip() == SAID[tool].strip()


@pytest.mark.parametrize("way", WAYS)
def test_node_says_nothing_of_its_own_setting(live: Agent, box: Box, way: str) -> None:
    fetch = f'node -e "fetch(\\"{URL}/file\\").then(r => r.text()).then(t => console.log(t))"'
    said = says(live, box("img_way_node"), WAYS[way].format(fetch))
    # Node has no file of its own to be told in.
    assert said.strip() == "served" or (way == "env -i" and "fetch failed" in said)
    assert "Warning" not in said


@pytest.mark.parametrize("mode", ["off", "open"])
def test_no_proxy_is_named_where_there_is_none(live: Agent, box: Box, mode: str) -> None:
    name, address = box("img_way_python", mode), "10[.]20[0-9][.]"
    looked = "cat /etc/environment /etc/profile.d/* /etc/xdg/pip/* /etc/npmrc /etc/apt/apt.conf.d/*"
    assert says(live, name, f"{looked} | grep -E '{address}'") == ""
    asked = 'env | grep -i -E "^(https?_proxy|no_proxy|yarn_http|node_(use|opt))"'
    for way in WAYS.values():
        assert says(live, name, way.format(asked)) == ""


def test_sudo_takes_its_drop_in(live: Agent, box: Box) -> None:
    name = box("img_way_python")
    assert "orkestr: parsed OK" in says(live, name, "visudo -c")
    assert says(live, name, "stat -c %a /etc/sudoers.d/orkestr") == "440"


def test_a_snapshot_is_told_of_the_network_it_is_started_on(live: Agent, box: Box) -> None:
    name = box("img_way_python")
    says(live, name, "echo APP=own >>/etc/environment; echo fund=false >>/etc/npmrc")
    live.client.create_snapshot("snap_way", name)
    fork = f"sbx_way{next(NUMBERS)}"
    live.client.create_sandbox(
        CreateSandbox(fork, image="", snapshot="snap_way", cpu=1.0, memory_mb=512, network="off")
    )
    try:
        assert says(live, fork, "grep -ciE '^(https?_|https?-|)proxy' /etc/environment") == "0"
        assert says(live, fork, "grep -c proxy= /etc/npmrc") == "0"
        assert says(live, fork, "su - app -c 'echo $APP'") == "own"
        assert says(live, fork, "tail -1 /etc/npmrc") == "fund=false"
    finally:
        live.client.delete_sandbox(fork)
        live.client.delete_snapshot("snap_way")


# What a recipe does to the same files ------------------------------------------------------

COMPANY = (
    "cd /root && openssl req -x509 -newkey rsa:2048 -nodes -days 30 -keyout key.pem -out own.crt "
    "-subj /CN=company.test -addext subjectAltName=DNS:company.test 2>/dev/null && "
    "cp own.crt /usr/local/share/ca-certificates/ && update-ca-certificates"
)
RECIPE = (
    COMPANY,
    "echo 192.0.2.77 company.test >>/etc/hosts",
    "echo 'deb https://company.test/debian stable main' >>/etc/apt/sources.list",
    "git config --system user.name Company && echo APP=own >>/etc/environment",
    "echo fund=false >>/etc/npmrc && chown -R root:root /etc/gitconfig /etc/hosts",
    "echo nameserver 192.0.2.53 >/etc/resolv.conf",
    f"wget -qO- https://{UNLISTED}/install.sh | sh",
)


@pytest.fixture(scope="module")
def recipes_image(live: Agent) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """An image whose recipe writes to what the runtime lends, and the events of its build."""
    events = built(live.client, "img_way_own", *RECIPE, base="img_way_python")
    yield "img_way_own", events
    live.client.delete_image("img_way_own")


def test_nothing_that_was_lent_is_captured(
    live: Agent, recipes_image: tuple[str, list[dict[str, object]]]
) -> None:
    tree = live.state / "images" / recipes_image[0] / "tree"
    proxy = live.client.health().proxy["address"].rpartition(":")[0].encode()
    files = [path for path in (tree / "etc").rglob("*") if path.is_file() and not path.is_symlink()]
    assert [str(path) for path in files if proxy in path.read_bytes()] == []
    assert (tree / "etc/hosts").read_text().splitlines()[-1] == "192.0.2.77 company.test"
    assert "orkestr" not in (tree / "etc/hosts").read_text()
    assert (tree / "etc/gitconfig").read_text() == "[user]\n\tname = Company\n"
    assert (tree / "etc/environment").read_text() == "APP=own\n"
    assert (tree / "etc/npmrc").read_text() == "fund=false\n"
    own = next(iter(certificates((tree / "root/own.crt").read_bytes())))
    kept = certificates((tree / BUNDLE.lstrip("/")).read_bytes())
    assert own in kept
    lent = live.state / "runtime" / (live.state / "runtime/restricted").readlink()
    for path in (lent / "usr/local/share/ca-certificates").iterdir():
        assert not set(certificates(path.read_bytes())) & set(kept)
    assert not list((tree / "etc/ssl/certs").glob("orkestr-host-*"))


@pytest.mark.parametrize("mode", ["restricted", "off"])
def test_a_sandbox_has_the_recipes_and_the_hosts(
    live: Agent, box: Box, recipes_image: tuple[str, list[dict[str, object]]], mode: str
) -> None:
    name = box(recipes_image[0], mode)
    assert says(live, name, "getent hosts company.test").split()[0] == "192.0.2.77"
    assert says(live, name, "getent hosts sandbox").split()[0] == "127.0.1.1"
    assert says(live, name, "git config user.name") == "Company"
    assert says(live, name, "su - app -c 'echo $APP'") == "own"
    assert says(live, name, "grep -c company.test /etc/apt/sources.list") == "1"
    assert says(live, name, f"openssl verify -CAfile {BUNDLE} /root/own.crt") == "/root/own.crt: OK"
    if mode == "restricted":
        assert says(live, name, WAYS["su -"].format(ASK["wget"])) == SAID["wget"]


def test_what_cannot_be_kept_and_what_was_refused_is_said_at_its_step(
    recipes_image: tuple[str, list[dict[str, object]]],
) -> None:
    events = recipes_image[1]
    (told,) = [event for event in events if event["kind"] == "not_captured"]
    assert (told["step"], told["paths"]) == (6, ["/etc/resolv.conf"])
    refused = {
        event["step"]: event["refused"] for event in events if event["kind"] == "step_finished"
    }
    assert refused.pop(7) == [RefusedHost(UNLISTED, 443, "not_listed").to_wire()]
    assert not any(refused.values())
