"""What the host's package managers answer, read; with hosts that do not exist."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

import hostruntime
from hostruntime.network.policy import matches, parse_domain_list
from hostruntime.network.registries import (
    AptSource,
    NpmConfig,
    PipConfig,
    combine,
    host_registries,
    parse_apt,
    parse_npm,
    parse_npm_definitions,
    parse_pip,
    query_apt,
    query_npm,
    query_pip,
)

ALLOWLIST = Path(hostruntime.__file__).parent / "network/data" / "egress-allowlist.txt"
DEFAULTS = "https://index.example/simple files.example\n"


def pip(index: str | None = None, *extra: str) -> PipConfig:
    return PipConfig(index, extra, "https://index.example/simple/", "files.example")


def test_pip_without_configuration_uses_its_own_index_and_file_host() -> None:
    answer = parse_pip("", DEFAULTS)
    assert answer == pip()
    registries = combine(answer, None, [])
    assert registries.domains == ("index.example", "files.example")
    assert registries.pip_conf() == ""


def test_pip_pointed_at_a_mirror_takes_the_sandboxes_along() -> None:
    listing = (
        ":env:.index-url='https://later.example/simple'\n"
        "global.extra-index-url='https://one.example/simple https://two.example/simple'\n"
        "global.timeout='60'\n"
    )
    registries = combine(parse_pip(listing, DEFAULTS), None, [])
    assert registries.domains == ("later.example", "one.example", "two.example")
    assert registries.pip_conf() == (
        "[global]\nindex-url = https://later.example/simple\n"
        "extra-index-url = https://one.example/simple\n\thttps://two.example/simple\n\n"
    )


def test_pip_extra_indexes_on_the_hosts_own_disk_stay_there() -> None:
    listing = "global.extra-index-url='file:///srv/simple https://two.example/simple'\n"
    registries = combine(parse_pip(listing, DEFAULTS), None, [])
    assert registries.domains == ("index.example", "two.example", "files.example")
    assert "file:" not in registries.pip_conf()


def test_several_lines_in_pips_configuration_file_are_several_indexes() -> None:
    listing = "global.extra-index-url='\\nhttps://one.example/s\\nhttps://two.example/s'\n"
    extra = parse_pip(listing, DEFAULTS).extra
    assert extra == ("https://one.example/s", "https://two.example/s")


def test_credentials_never_leave_the_host() -> None:
    secret = pip("https://robot:hunter2@mirror.example/simple")
    npm = NpmConfig("https://robot:hunter2@npm.example/", ())
    registries = combine(secret, npm, [])
    assert registries.domains == ("mirror.example", "npm.example")
    assert "hunter2" not in registries.pip_conf() + registries.npmrc() + repr(registries.notes)
    assert any("needs credentials" in note for note in registries.notes)


def test_npm_says_its_registry_and_those_of_scopes() -> None:
    listing = (
        '{"registry": "https://npm.example/", "@team:registry": "https://team.example/npm/",'
        ' "@team:_auth": "x", "cache": "/root/.npm"}'
    )
    answer = parse_npm(listing)
    assert answer == NpmConfig(
        "https://npm.example/", (("@team:registry", "https://team.example/npm/"),)
    )
    registries = combine(None, answer, [])
    assert registries.domains == ("npm.example", "team.example")
    assert registries.npmrc() == (
        "registry=https://npm.example/\n@team:registry=https://team.example/npm/\n"
    )


@pytest.mark.parametrize("listing", ["", "npm error", "{}", '{"cache": "x"}'])
def test_npm_that_answers_something_else_is_an_error(listing: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        parse_npm(listing)


def test_asking_leaves_nothing_in_a_fresh_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bool(query_npm()) == bool(shutil.which("npm"))
    assert query_pip()
    assert query_apt()
    assert list(tmp_path.iterdir()) == []


def test_npms_default_is_found_in_its_own_table() -> None:
    source = "  registry: new Definition('registry', {\n    default: 'https://npm.example/',\n"
    assert parse_npm_definitions(source) == NpmConfig("https://npm.example/", ())
    assert parse_npm_definitions("nothing of the kind") is None


def test_apt_keeps_debians_own_suites_and_drops_other_vendors() -> None:
    listing = (
        "http://mirror.example/debian\tbookworm\tmain\tDebian\n"
        "http://mirror.example/debian\tbookworm\tmain\tDebian\n"
        "http://mirror.example/debian\tbookworm\tcontrib\tDebian\n"
        "http://mirror.example/debian/\tbookworm-updates\tmain\t\n"
        "https://security.example/debian-security\tbookworm-security\tmain\tDebian\n"
        "https://vendor.example/apt\tcloud-sdk-bookworm\tmain\t\n"
        "https://vendor.example/apt\tbookworm\tmain\tVendor Inc\n"
        "https://vendor.example/apt\tbookworm\tstable\t\n"
        "https://vendor.example/apt\tbookworm-pgdg\tmain\t\n"
        "cdrom:[disc]\tbookworm\tmain\t\n"
        "file:/srv/debs\t./\t\t\n"
        "\n"
    )
    sources = parse_apt(listing)
    assert sources == (
        AptSource("http://mirror.example/debian", "", "main"),
        AptSource("http://mirror.example/debian", "", "contrib"),
        AptSource("http://mirror.example/debian", "-updates", "main"),
        AptSource("https://security.example/debian-security", "-security", "main"),
    )
    registries = combine(None, None, sources)
    assert registries.domains == ("mirror.example", "security.example")
    assert registries.apt_sources("bookworm") == (
        "deb https://mirror.example/debian bookworm main contrib\n"
        "deb https://mirror.example/debian bookworm-updates main\n"
        "deb https://security.example/debian-security bookworm-security main\n"
    )


def test_a_suite_without_lists_yet_is_told_by_its_site() -> None:
    listing = (
        "http://mirror.example/debian\tbookworm\tmain\tDebian\n"
        "https://vendor.example/apt\tbookworm\tmain\tVendor Inc\n"
        # And all that is configured, whose origin is not looked up.
        "http://mirror.example/debian\tbookworm\tmain\t$(ORIGIN)\n"
        "http://mirror.example/debian\tbookworm-updates\tmain\t$(ORIGIN)\n"
        "https://vendor.example/apt\tbookworm\tmain\t$(ORIGIN)\n"
        "https://other.example/apt\tbookworm\tmain\t$(ORIGIN)\n"
    )
    assert parse_apt(listing) == (
        AptSource("http://mirror.example/debian", "", "main"),
        AptSource("http://mirror.example/debian", "-updates", "main"),
    )


APT_SOURCES = """
deb https://mirror.example/debian bookworm main contrib
deb https://mirror.example/debian bookworm-updates main
deb https://security.example/debian-security bookworm-security main
deb [trusted=yes] https://vendor.example/stable/debian bookworm main
"""


@pytest.fixture
def fresh_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt that has never fetched a list; the file of its sources."""
    (tmp_path / "lists" / "partial").mkdir(parents=True)
    sources, configuration = tmp_path / "sources.list", tmp_path / "apt.conf"
    sources.write_text(APT_SOURCES)
    configuration.write_text(
        f'Dir::State::lists "{tmp_path}/lists";\n'
        f'Dir::Etc::sourcelist "{sources}";\nDir::Etc::sourceparts "/dev/null";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(configuration))
    return sources


def test_apt_that_never_fetched_a_list_still_names_its_mirrors(fresh_apt: Path) -> None:
    assert query_apt() == (
        AptSource("https://mirror.example/debian", "", "main"),
        AptSource("https://mirror.example/debian", "", "contrib"),
        AptSource("https://mirror.example/debian", "-updates", "main"),
        AptSource("https://security.example/debian-security", "-security", "main"),
    )


def test_a_lone_mirror_without_lists_is_debians(fresh_apt: Path) -> None:
    fresh_apt.write_text("deb https://mirror.example/debian bookworm main\n")
    assert query_apt() == (AptSource("https://mirror.example/debian", "", "main"),)


def test_what_another_distribution_has_no_lists_of_is_not_debians(
    fresh_apt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh_apt.write_text(
        "deb https://mirror.example/ubuntu noble main universe\n"
        "deb https://mirror.example/ubuntu noble-updates main\n"
    )
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "ubuntu"})
    assert query_apt() == ()


def test_a_mirror_list_stands_for_its_first_mirror(tmp_path: Path) -> None:
    listed = tmp_path / "debian.list"
    listed.write_text(
        "# ours\nhttps://near.example/debian\tpriority:1\nhttp://far.example/debian\n"
    )
    line = "mirror+file:{}\tbookworm\tmain\tDebian\n"
    assert parse_apt(line.format(listed)) == (AptSource("https://near.example/debian", "", "main"),)
    assert parse_apt(line.format(tmp_path / "none.list")) == ()


def test_a_host_of_another_release_still_gives_the_bases_suites() -> None:
    sources = parse_apt("http://mirror.example/debian\ttrixie-updates\tmain\tDebian\n")
    registries = combine(None, None, sources)
    expected = "deb https://mirror.example/debian bookworm-updates main\n"
    assert registries.apt_sources("bookworm") == expected


def test_what_the_proxy_will_refuse_anyway_is_said() -> None:
    registries = combine(
        pip("http://plain.example/simple", "https://port.example:8443/simple"),
        NpmConfig("https://192.0.2.7/", ()),
        [],
    )
    assert registries.domains == ("plain.example", "port.example")
    text = "\n".join(registries.notes)
    for word in ("plain.example", "port.example", "192.0.2.7", "apt names no Debian mirror"):
        assert word in text


def test_a_host_without_package_managers_allows_none_and_says_so() -> None:
    registries = combine(None, None, [])
    assert registries.domains == ()
    assert len(registries.notes) == 3
    assert registries.pip_conf() == registries.npmrc() == registries.apt_sources("x") == ""


@pytest.mark.parametrize(
    ("language", "hosts"),
    [
        ("Yarn", "repo.yarnpkg.com"),
        ("Rust", "index.crates.io static.crates.io static.rust-lang.org sh.rustup.rs"),
        ("Ruby", "rubygems.org index.rubygems.org"),
        ("Go", "proxy.golang.org sum.golang.org go.dev dl.google.com"),
        ("Maven", "repo.maven.apache.org repo1.maven.org plugins.gradle.org services.gradle.org"),
        (".NET", "api.nuget.org dot.net builds.dotnet.microsoft.com"),
        ("conda", "conda.anaconda.org repo.anaconda.com micro.mamba.pm"),
        ("PHP", "repo.packagist.org getcomposer.org codeload.github.com"),
        ("R", "cloud.r-project.org cran.r-project.org cran.rstudio.com bioconductor.org"),
    ],
)
def test_the_default_list_has_the_registries_of_each_language(language: str, hosts: str) -> None:
    listed = parse_domain_list(ALLOWLIST.read_text())
    found = {host: matches(host, listed) for host in hosts.split()}
    assert None not in found.values(), language


def test_what_the_host_is_asked_for_is_not_written_down() -> None:
    asked = host_registries(Path("/nonexistent")).domains
    listed = parse_domain_list(ALLOWLIST.read_text())
    assert asked
    assert [host for host in asked if matches(host, listed)] == []
