"""Language servers, a web site with all its processes, and operations."""

from __future__ import annotations

from tests.recipes.stacks.stack import Stack, apt, file, once

# A client that says hello and asks what is at a place; the servers differ in their command alone.
_ASK = """\
import json, subprocess, sys

path, line, column, *command = sys.argv[1:]
uri = "file://" + path
server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def send(method, number=None, **params):
    message = {"jsonrpc": "2.0", "method": method, "params": params}
    if number:
        message["id"] = number
    body = json.dumps(message).encode()
    server.stdin.write(b"Content-Length: %d\\r\\n\\r\\n%s" % (len(body), body))
    server.stdin.flush()


def answer(number):
    while True:
        length = 0
        while (head := server.stdout.readline().strip()):
            if head.lower().startswith(b"content-length"):
                length = int(head.split(b":")[1])
        said = json.loads(server.stdout.read(length))
        if said.get("id") == number and "method" not in said:
            return said["result"]
        if "id" in said:  # it asks for settings, which are its own
            body = json.dumps({"jsonrpc": "2.0", "id": said["id"], "result": [None]}).encode()
            server.stdin.write(b"Content-Length: %d\\r\\n\\r\\n%s" % (len(body), body))
            server.stdin.flush()


send("initialize", 1, processId=None, rootUri="file:///root", capabilities={})
answer(1)
send("initialized")
text = {"uri": uri, "languageId": "", "version": 1, "text": open(path).read()}
text["languageId"] = "python" if path.endswith("py") else "typescript"
send("textDocument/didOpen", textDocument=text)
at = {"line": int(line), "character": int(column)}
send("textDocument/hover", 2, textDocument={"uri": uri}, position=at)
print("hover", json.dumps(answer(2)["contents"]))
server.kill()
"""
_PYTHON = 'def total(prices: list[int]) -> int:\n    """Sum of prices."""\n    return sum(prices)\n'
_TYPESCRIPT = "function total(prices: number[]): number { return prices.length; }\n"

SERVERS = (
    Stack(
        "python-language-servers",
        "python-3.12",
        (
            apt("nodejs npm"),
            "pip install python-lsp-server && npm install -g pyright",
            file("/root/ask.py", _ASK),
            file("/root/shop.py", _PYTHON),
        ),
        (
            ("python /root/ask.py /root/shop.py 0 5 pylsp", "Sum of prices."),
            (
                "python /root/ask.py /root/shop.py 0 5 pyright-langserver --stdio",
                "total(prices: list[int]) -> int",
            ),
        ),
    ),
    Stack(
        "typescript-language-server",
        "node-22",
        (
            apt("python3"),
            "npm install -g typescript@5 typescript-language-server",
            file("/root/ask.py", _ASK),
            file("/root/shop.ts", _TYPESCRIPT),
        ),
        (
            (
                "python3 /root/ask.py /root/shop.ts 0 10 typescript-language-server --stdio",
                "function total(prices: number[]): number",
            ),
        ),
    ),
    Stack(
        "django-behind-nginx",
        "python-3.12",
        (
            apt("nginx-light supervisor"),
            "pip install django gunicorn && mkdir /opt/site && "
            "django-admin startproject site1 /opt/site && cd /opt/site && "
            "echo \"STATIC_ROOT = '/opt/static'; ALLOWED_HOSTS = ['*']\" >> site1/settings.py && "
            "python manage.py migrate && python manage.py collectstatic --no-input && "
            "DJANGO_SUPERUSER_PASSWORD=secret python manage.py createsuperuser --no-input "
            "--username ann --email ann@example.com",
            file(
                "/etc/nginx/sites-enabled/default",
                "server { listen 80; location /static/ { alias /opt/static/; }\n"
                "  location / { proxy_pass http://127.0.0.1:8000; } }\n",
            ),
            file(
                "/etc/supervisor/conf.d/site.conf",
                "[program:web]\ncommand=gunicorn site1.wsgi\ndirectory=/opt/site\n"
                "[program:nginx]\ncommand=nginx -g 'daemon off;'\n",
            ),
        ),
        (
            (
                "service supervisor start >/dev/null; "
                + once("curl -sf localhost/admin/login/ -o /root/page")
                + "; grep -o 'Django administration' /root/page | head -n 1",
                "Django administration",
            ),
            ("curl -s -o /dev/null -w '%{http_code}' localhost/static/admin/css/base.css", "200"),
            (
                "cd /opt/site && python manage.py shell -c 'from django.contrib.auth import "
                'authenticate; print(authenticate(username="ann", password="secret"))\'',
                "ann",
            ),
        ),
    ),
    Stack(
        "ansible",
        "python-3.12",
        (
            "pip install ansible-core",
            file(
                "/root/play.yml",
                "- hosts: localhost\n  connection: local\n  tasks:\n"
                "    - copy: {dest: /root/made, content: 'sum {{ range(101) | sum }}'}\n",
            ),
        ),
        (
            ("cd /root && ansible-playbook play.yml && cat made", "sum 5050"),
            ("cd /root && ansible-playbook play.yml", "changed=0"),
        ),
    ),
)
