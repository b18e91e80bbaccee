"""The recipes, and what must work in a sandbox of each: data alone.

A check is a command that must end with status 0.  Those marked ``quick`` run with the suite; all
of them by `make recipes`, as they install some gigabytes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """A template's steps on a base, and the commands that use what they installed."""

    name: str
    base: str
    steps: tuple[str, ...]
    checks: tuple[str, ...]
    quick: bool = False


def _apt(packages: str) -> str:
    return f"apt-get update && apt-get install -y --no-install-recommends {packages}"


def _service(packages: str, start: str, probe: str, *more: str, quick: bool = False) -> Recipe:
    """A service of Debian's: installed, and in the sandbox started and asked for something."""
    wait = f"for _ in $(seq 75); do ({probe}) && exit 0; sleep 0.2; done"
    tell = "tail -n 20 $(find /var/log -type f -size +0) >&2; exit 1"
    return Recipe(
        packages.split()[0],
        "debian-12",
        (_apt(packages), *more),
        (f"{start} && {{ {wait}; {tell}; }}",),
        quick=quick,
    )


# Tools that do not ask pip or npm which registry they should use.
_DEFAULT_INDEX = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
_INDEX = f"$(pip config get global.index-url 2>/dev/null || python -c '{_DEFAULT_INDEX}')"
_APP = "mkdir -p /root/app && cd /root/app"
_PYTHON = (
    f"{_APP} && export UV_DEFAULT_INDEX={_INDEX} && "
    "export PIPENV_PYPI_MIRROR=$UV_DEFAULT_INDEX PDM_PYPI_URL=$UV_DEFAULT_INDEX"
)
_REGISTRY = "$(npm config get registry)"
_NODE = f"{_APP} && export YARN_NPM_REGISTRY_SERVER={_REGISTRY} YARN_HTTPS_PROXY=$HTTPS_PROXY"
_HUMANIZE = "python -c 'import humanize; assert humanize.naturalsize(1) == \"1 Byte\"'"
_LEFT_PAD = 'node -e \'if (require("left-pad")(1, 3) !== "  1") process.exit(1)\''
_PACKAGE = """echo '{"name":"app","version":"1.0.0","dependencies":{"left-pad":"1.3.0"}}' \\
    > package.json"""


def _uv(mode: str) -> Recipe:
    return Recipe(
        f"uv-{mode}",
        "python-3.12",
        (f"pip install uv && {_PYTHON} UV_LINK_MODE={mode} && uv venv && uv pip install humanize",),
        (f"cd /root/app && . .venv/bin/activate && {_HUMANIZE}",),
        quick=mode == "symlink",
    )


def _yarn(name: str, settings: str) -> Recipe:
    return Recipe(
        name,
        "node-22",
        (
            "npm install -g @yarnpkg/cli-dist",
            f"{_NODE} && touch yarn.lock && {settings} && {_PACKAGE} && yarn install",
        ),
        (f"cd /root/app && yarn {_LEFT_PAD}",),
        quick=name == "yarn-4-pnp",
    )


PYTHON_TOOLS = (
    Recipe(
        "poetry",
        "python-3.12",
        (
            "pip install poetry",
            f'{_PYTHON} && printf \'[project]\\nname="app"\\nversion="0.1.0"\\n'
            'requires-python=">=3.12"\\n[tool.poetry]\\npackage-mode=false\\n\' '
            "> pyproject.toml && poetry install --no-interaction",
            "cd /root/app && poetry run pip install humanize",
        ),
        (f"cd /root/app && poetry run {_HUMANIZE}",),
        quick=True,
    ),
    Recipe(
        "pipenv",
        "python-3.12",
        ("pip install pipenv", f"{_PYTHON} && pipenv install humanize"),
        (f"cd /root/app && pipenv run {_HUMANIZE}",),
    ),
    Recipe(
        "pdm",
        "python-3.12",
        (
            # The newest of what it asks for is not what it works with.
            "pip install 'pdm[locked]'",
            f"{_PYTHON} && pdm init -n && pdm add humanize",
        ),
        (f"cd /root/app && pdm run {_HUMANIZE}",),
    ),
    Recipe(
        "pipx",
        "python-3.12",
        ("pip install pipx", "pipx install cowsay"),
        ("/root/.local/bin/cowsay -t hello | grep hello",),
    ),
    Recipe(
        "hatch",
        "python-3.12",
        (
            "pip install hatch",
            f'{_PYTHON} && printf \'[project]\\nname="app"\\nversion="0.1.0"\\n'
            '[tool.hatch.envs.default]\\nskip-install=true\\ndependencies=["humanize"]\\n\' '
            f"> pyproject.toml && hatch run {_HUMANIZE}",
        ),
        (f"cd /root/app && hatch run {_HUMANIZE}",),
    ),
    *(_uv(mode) for mode in ("clone", "copy", "hardlink", "symlink")),
    Recipe(
        "uv-run",
        "python-3.12",
        (f"pip install uv && {_PYTHON} && uv init -q && uv add -q humanize && uv run {_HUMANIZE}",),
        (f"cd /root/app && uv run {_HUMANIZE}",),
    ),
    Recipe(
        "uv-script",
        "python-3.12",
        (
            f"pip install uv && {_PYTHON} && printf '# /// script\\n"
            '# dependencies = ["humanize"]\\n'
            "# ///\\nimport humanize\\nprint(humanize.naturalsize(1))\\n' > s.py && uv run s.py",
        ),
        ("uv run /root/app/s.py | grep '1 Byte'",),
    ),
    Recipe(
        "uvx",
        "python-3.12",
        (f"pip install uv && {_PYTHON} && uvx cowsay -t hello",),
        ("uvx cowsay -t hello | grep hello",),
    ),
    Recipe(
        "uv-tool",
        "python-3.12",
        (f"pip install uv && {_PYTHON} && uv tool install cowsay",),
        ("/root/.local/bin/cowsay -t hello | grep hello",),
    ),
    Recipe(
        "pre-commit-and-tox",
        "python-3.12",
        (
            "pip install pre-commit tox",
            f"{_APP} && printf '[testenv]\\nskip_install=true\\ndeps=humanize\\n"
            'commands=python -c "import humanize"\\n\' > tox.ini && tox -e py',
            "cd /root/app && git init -q . && printf 'repos:\\n- repo: local\\n  hooks:\\n"
            "  - {id: a, name: a, language: python, entry: cowsay -t, files: tox.ini,\\n"
            "     additional_dependencies: [cowsay]}\\n' > .pre-commit-config.yaml && "
            "git add . && pre-commit run --all-files",
        ),
        ("cd /root/app && tox -e py", "cd /root/app && pre-commit run --all-files | grep Passed"),
    ),
    Recipe(
        "jupyter",
        "python-3.12",
        ("pip install notebook",),
        (
            'cd /root && printf \'%s\' \'{"cells":[{"cell_type":"code","execution_count":null,'
            '"id":"a","metadata":{},"outputs":[],"source":["print(6*7)"]}],"metadata":{},'
            '"nbformat":4,"nbformat_minor":5}\' > n.ipynb && '
            "jupyter nbconvert --to notebook --execute --stdout n.ipynb | grep 42",
            "(jupyter server --allow-root --ServerApp.token=t >/root/j.log 2>&1 &) && "
            "for _ in $(seq 100); do curl -sf 'localhost:8888/api?token=t' && exit 0; sleep 0.2; "
            "done; "
            "cat /root/j.log; exit 1",
        ),
    ),
    Recipe(
        "playwright",
        "python-3.12",
        ("pip install playwright",),
        ("playwright --version",),
        quick=True,
    ),
)

NODE_TOOLS = (
    Recipe(
        "yarn-1",
        "node-22",
        (
            "npm install -g yarn@1",
            f"{_NODE} && yarn config set registry {_REGISTRY} && {_PACKAGE} && yarn",
        ),
        (f"cd /root/app && yarn -s {_LEFT_PAD}",),
    ),
    _yarn("yarn-4-pnp", "true"),
    _yarn("yarn-4-project-cache", "yarn config set enableGlobalCache false"),
    _yarn("yarn-4-node-modules", "yarn config set nodeLinker node-modules"),
    Recipe(
        "pnpm",
        "node-22",
        ("npm install -g pnpm@9", f"{_NODE} && {_PACKAGE} && pnpm install"),
        (f"cd /root/app && pnpm exec {_LEFT_PAD}",),
    ),
    Recipe(
        "pnpm-dlx",
        "node-22",
        ("npm install -g pnpm@9", "pnpm dlx semver@7.6.0 1.2.3"),
        ("pnpm dlx semver@7.6.0 -i minor 1.2.3 | grep 1.3.0",),
    ),
    Recipe(
        "corepack",
        "node-22",
        (
            # Not every mirror of the registry passes on its signatures.
            "export COREPACK_INTEGRITY_KEYS=0 && corepack enable pnpm && "
            "corepack prepare pnpm@9.12.0 --activate",
            # Yarn's, by npm, is still to be had: corepack's is not there until it is enabled.
            f"{_NODE} && {_PACKAGE} && pnpm install && npm install -g yarn@1",
        ),
        (f"cd /root/app && pnpm exec {_LEFT_PAD}", "pnpm -v | grep 9.12.0", "yarn -v | grep '^1'"),
        quick=True,
    ),
    Recipe(
        "bun",
        "node-22",
        ("npm install -g bun", f"{_APP} && {_PACKAGE} && bun install && bunx semver@7.6.0 1.2.3"),
        (
            "cd /root/app && bun -e 'console.log(require(\"left-pad\")(1, 3))' | grep '^  1'",
            "bunx semver@7.6.0 -i minor 1.2.3 | grep 1.3.0",
        ),
    ),
    Recipe(
        "deno",
        "node-22",
        (
            "npm install -g deno",
            f"{_APP} && echo 'import pad from \"npm:left-pad@1.3.0\"; console.log(pad(1, 3));' "
            "> pad.ts && deno run -A pad.ts",
        ),
        ("cd /root/app && deno run -A pad.ts | grep '^  1'",),
    ),
    Recipe(
        "npx",
        "node-22",
        ("npx -y semver 1.2.3",),
        ("npx semver -i minor 1.2.3 | grep 1.3.0",),
        quick=True,
    ),
)

# Without systemd: `service` runs what the package brings for System V.
SERVICES = (
    _service(
        "openssh-server", "service ssh start", "ssh-keyscan -T 2 localhost | grep -q ssh-ed25519"
    ),
    _service(
        "bind9",
        "ls -ld /var/cache/bind | grep 'root bind' && named-checkconf && service named start",
        "ss -lun 2>/dev/null | grep -q ':53 ' || pgrep named",
        quick=True,
    ),
    _service("apache2", "service apache2 start", "curl -sf localhost | grep -q Apache2"),
    _service("nginx", "service nginx start", "curl -sf localhost | grep -q nginx"),
    _service("lighttpd", "service lighttpd start", "curl -s localhost | grep -q ."),
    _service(
        "tomcat10 procps",
        "su -s /bin/sh tomcat -c 'CATALINA_HOME=/usr/share/tomcat10 CATALINA_TMPDIR=/tmp "
        "CATALINA_BASE=/var/lib/tomcat10 /usr/share/tomcat10/bin/catalina.sh start'",
        "curl -sf localhost:8080 | grep -q 'It works'",
    ),
    _service("cups cups-client", "service cups start", "lpstat -r | grep -q 'is running'"),
    _service(
        "mariadb-server",
        "service mariadb start",
        "mariadb -e 'create database if not exists a; show databases' | grep -q a",
        "service mariadb start && mariadb -e 'create database baked' && service mariadb stop",
    ),
    _service(
        "postgresql",
        "service postgresql start",
        "su postgres -c 'psql -lqt' | grep -q baked",
        "service postgresql start && su postgres -c 'createdb baked' && service postgresql stop",
    ),
    _service("redis-server", "service redis-server start", "redis-cli ping | grep -q PONG"),
    _service("memcached", "service memcached start", "pgrep memcached"),
    _service("php-fpm", "service php8.2-fpm start", "pgrep -f php-fpm"),
    _service("haproxy", "service haproxy start", "pgrep haproxy"),
    _service("squid", "service squid start", "curl -s localhost:3128 | grep -qi squid"),
    _service("postfix", "service postfix start", "postfix status"),
    _service("exim4-daemon-light", "service exim4 start", "pgrep exim4"),
    _service("dovecot-imapd", "service dovecot start", "pgrep dovecot"),
    _service("rabbitmq-server", "service rabbitmq-server start", "rabbitmqctl status >/dev/null"),
    _service(
        "mosquitto mosquitto-clients",
        # Its script leaves the directory to systemd, and makes a pid file it cannot write to.
        "install -d -o mosquitto /run/mosquitto && mosquitto -d -c /etc/mosquitto/mosquitto.conf",
        "mosquitto_pub -t a -m b",
    ),
    _service("samba", "service smbd start", "pgrep smbd"),
    _service(
        "vsftpd", "service vsftpd start", "curl -s ftp://localhost/ --user a:b -m 5; test $? = 67"
    ),
    _service("cron", "service cron start", "pgrep cron"),
    _service("rsyslog", "rsyslogd && logger hello", "grep -q hello /var/log/syslog"),
    _service("supervisor", "service supervisor start", "supervisorctl status"),
    _service("unbound dns-root-data", "service unbound start", "pgrep unbound"),
    _service("dnsmasq", "service dnsmasq start", "pgrep dnsmasq"),
    _service(
        "slapd ldap-utils",
        "service slapd start",
        "ldapsearch -x -H ldap://localhost -s base -b '' >/dev/null",
    ),
    _service("varnish", "service varnish start", "pgrep varnishd"),
    _service("snmpd", "service snmpd start", "pgrep snmpd"),
    _service("proftpd-core", "service proftpd start", "pgrep proftpd"),
    _service(
        "fail2ban", "touch /var/log/auth.log && service fail2ban start", "fail2ban-client ping"
    ),
    _service("munin-node", "service munin-node start", "pgrep -f munin-node"),
    _service(
        "dbus",
        "bus=org.freedesktop.DBus; service dbus start",
        "dbus-send --system --print-reply --dest=$bus / $bus.ListNames",
    ),
)

PROGRAMS = (
    Recipe(
        "openjdk",
        "debian-12",
        (_apt("openjdk-17-jdk-headless"),),
        (
            "cd /root && echo 'class A { public static void main(String[] a) "
            "{ System.out.println(6 * 7); } }' > A.java && javac A.java && java A | grep 42",
        ),
    ),
    Recipe(
        "tar-large-ids",
        "debian-12",
        (
            "cd /root && mkdir t && echo x > t/f && "
            "tar --owner=vendor:1234567 --group=vendor:7654321 -czf /opt/v.tgz t && "
            "cd /opt && tar -xzf v.tgz",
        ),
        ('test "$(stat -c %u:%g /opt/t/f)" = 1234567:7654321', "cat /opt/t/f && rm -r /opt/t"),
        quick=True,
    ),
    Recipe(
        "sudo-and-locale",
        "debian-12",
        ("useradd -m -s /bin/bash ann && echo 'ann ALL=(ALL) NOPASSWD:ALL' > /etc/sudoers.d/ann",),
        ("su - ann -c 'sudo id -u' | grep '^0$'", "LC_ALL=en_US.UTF-8 locale charmap | grep UTF-8"),
        quick=True,
    ),
)

# Of the most downloaded, those that are imported under a name; by what they are imported as.
_SAME_NAME = (
    *("boto3", "urllib3", "requests", "certifi", "idna", "packaging", "numpy", "pandas", "click"),
    *("jinja2", "markupsafe", "cryptography", "pytz", "rsa", "jmespath", "pydantic", "fsspec"),
    *("colorama", "platformdirs", "virtualenv", "pluggy", "filelock", "pytest", "wrapt", "scipy"),
    *("aiohttp", "sqlalchemy", "psutil", "lxml", "pyarrow", "greenlet", "tqdm", "openpyxl"),
    *("rich", "pygments", "matplotlib", "fastapi", "uvicorn", "flask", "django", "redis"),
    *("websockets", "orjson", "selenium"),
)
_OTHER_NAME = {
    "psycopg2-binary": "psycopg2",
    "grpcio": "grpc",
    "protobuf": "google.protobuf",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "pyjwt": "jwt",
}
_NODE_PACKAGES = (
    *("lodash", "chalk", "react", "express", "axios", "typescript", "webpack", "eslint", "jest"),
    *("prettier", "commander", "debug", "uuid", "dotenv", "moment", "rxjs", "sharp", "esbuild"),
    *("bcryptjs", "vite", "next", "vue", "ws", "yargs", "glob", "semver", "zod", "mongodb"),
    *("mongoose", "pg", "mysql2", "redis", "socket.io", "body-parser", "cors", "jsonwebtoken"),
    *("nodemailer", "winston", "pino", "date-fns", "dayjs", "cheerio", "jsdom", "rimraf"),
    *("fs-extra", "inquirer", "ora", "postcss", "tailwindcss", "ts-node"),
)

PACKAGES = (
    Recipe(
        "python-packages",
        "python-3.12",
        (f"pip install {' '.join((*_SAME_NAME, *_OTHER_NAME))}",),
        (
            *(f"python -c 'import {name}'" for name in (*_SAME_NAME, *_OTHER_NAME.values())),
            "python -c 'import matplotlib.pyplot as p; p.plot([1]); p.savefig(\"/root/a.png\")'",
        ),
    ),
    Recipe(
        "node-packages",
        "node-22",
        (f"{_APP} && npm init -y && npm install {' '.join(_NODE_PACKAGES)}",),
        tuple(f"cd /root/app && node -e 'import(\"{name}\")'" for name in _NODE_PACKAGES),
    ),
)

RECIPES = (*PYTHON_TOOLS, *NODE_TOOLS, *SERVICES, *PROGRAMS, *PACKAGES)
