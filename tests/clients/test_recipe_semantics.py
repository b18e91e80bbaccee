"""What people write in a step means what it means in a shell, and nothing leaks into the next."""

from __future__ import annotations

import pytest

from tests.clients.making import Sandboxes, Templates

HEREDOC = """cat > /root/heredoc <<'END'
a 'quoted' "line" with $HOME and `ticks` and \\n
\ttab, ä, 😀
END
cat >> /root/heredoc <<END
$((6 * 7)) $HOME
END"""

# Each step, and what it must have printed.
STEPS = (
    ("cd /usr/share && pwd", "/usr/share\n"),
    ("pwd", "/root\n"),
    ("export LEAKED=1 && echo $LEAKED", "1\n"),
    ('echo "[${LEAKED-}]"', "[]\n"),
    ("umask 0 && set -u && alias ls=false && f() { :; }", ""),
    ("umask; type f 2>/dev/null || echo no f", "0022\nno f\n"),
    ('echo "$HOME" "$(id -u)" $$ | sed "s/[0-9]*$/pid/"', "/root 0 pid\n"),
    (r"""echo 'single "$HOME" \n' "double 'x' \"y\" \\" plain\ space""", None),
    (r"printf '%s\n' 'a\b' \$HOME '$(id)' '*' '~' '!!'", "a\\b\n$HOME\n$(id)\n*\n~\n!!\n"),
    (HEREDOC, ""),
    ("cat /root/heredoc | wc -l", "3\n"),
    ('for i in 1 2 3; do\n  echo "line $i"\ndone', "line 1\nline 2\nline 3\n"),
    ("echo ääää日本 😀 | cut -c1-3", None),
    ("set -e\ntrue\necho on", "on\n"),
    ("printf 'b\\na\\n' | sort | head -1", "a\n"),
    ("cat; echo read $?", "read 0\n"),
    ("read -r line || echo no input", "no input\n"),
    ("echo out; echo err >&2", "out\nerr\n"),
    ("(sleep 300 & echo $! > /root/background); echo begun", "begun\n"),
    ("kill -0 $(cat /root/background) 2>/dev/null && echo lives || echo gone", "gone\n"),
    ("echo kept > /tmp/between && echo kept > /workspace/between", ""),
    ("cat /tmp/between /workspace/between", "kept\nkept\n"),
    ("true; # a remark", ""),
    ("echo a \\\n  b", "a b\n"),
    ("test -t 0 || test -t 1 || echo no terminal", "no terminal\n"),
)


def test_steps_mean_what_they_mean_in_a_shell(templates: Templates, sandboxes: Sandboxes) -> None:
    template = templates.ready("debian-12", *(step for step, _ in STEPS))
    shown = templates.get(template)["steps"]
    for (command, expected), step in zip(STEPS, shown, strict=True):
        assert step["command"] == command
        if expected is not None:
            assert step["output"] == expected, command
    assert shown[7]["output"] == 'single "$HOME" \\n double \'x\' "y" \\ plain space\n'
    sandbox = sandboxes.boot(template)
    assert sandbox.exec("cat /root/heredoc").stdout == (
        "a 'quoted' \"line\" with $HOME and `ticks` and \\n\n\ttab, ä, 😀\n42 /root\n"
    )
    assert sandbox.exec("ls -A /tmp /workspace").stdout == "/tmp:\n\n/workspace:\n"


def test_an_install_script_is_pasted_whole(templates: Templates, sandboxes: Sandboxes) -> None:
    """As Windows ends its lines, and as large as a step may be."""
    line = "echo \"line 'of' the script\" >> /root/log\r\n"
    script = "#!/bin/bash\r\nset -e\r\n" + line * ((256 * 1024 - 40) // len(line))
    template = templates.ready("debian-12", script)
    done = sandboxes.boot(template).exec("sort /root/log | uniq -c")
    assert done.stdout.split(maxsplit=1) == [str(script.count(line)), "line 'of' the script\n"]


def test_what_is_left_in_memory_is_told_at_the_step(templates: Templates) -> None:
    shown = templates.get(
        templates.ready("debian-12", "mkdir /workspace/app", "true", "echo x > /tmp/x; mktemp")
    )
    first, second, third = (step["warnings"] for step in shown["steps"])
    assert "This step left /workspace/app." in first[0]
    assert second == []
    assert "This step left /tmp/x." in third[0]


def test_what_a_recipe_writes_to_etc_environment_counts(
    templates: Templates, sandboxes: Sandboxes
) -> None:
    template = templates.ready(
        "debian-12",
        "echo 'APP_HOME=/opt/app' >> /etc/environment",
        'test "$APP_HOME $KIND" = "/opt/app baked"',
        env={"KIND": "baked", "PATH": "$PATH:/opt/app/bin"},
    )
    sandbox = sandboxes.boot(template)
    assert (
        sandbox.exec("echo [$APP_HOME] $KIND ${PATH##*:}").stdout
        == "[/opt/app] baked /opt/app/bin\n"
    )
    assert sandbox.exec("echo $KIND", env={"KIND": "own"}).stdout == "own\n"


def test_a_daemon_is_stopped_before_the_capture(templates: Templates, sandboxes: Sandboxes) -> None:
    """One that writes for as long as it lives: what it wrote last is from before the next step."""
    daemon = "i=0; while :; do i=$((i + 1)); echo $i > /root/beat; sleep 0.01; done"
    template = templates.ready(
        "debian-12",
        f"(setsid sh -c '{daemon}' >/dev/null 2>&1 &) ; sleep 0.3",
        "cat /root/beat > /root/seen; sleep 0.3; cat /root/beat > /root/later",
    )
    sandbox = sandboxes.boot(template)
    beats = sandbox.exec("cat /root/seen /root/later /root/beat").stdout.split()
    assert int(beats[0]) > 1
    assert set(beats) == {beats[0]}


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ("set -e\nfalse\necho not reached", 1),
        ("exit 42", 42),
        ("nonsense-command-xyz", 127),
        ("if then", 2),
        ("echo 'unfinished", 2),
        ("/etc/passwd", 126),
    ],
)
def test_a_step_that_fails_fails_as_in_a_shell(templates: Templates, step: str, code: int) -> None:
    failed = templates.finished(templates.create("debian-12", step))
    assert (failed["status"], failed["error_code"]) == ("failed", "step_failed")
    assert failed["steps"][0]["exit_code"] == code
    assert "not reached" not in failed["steps"][0]["output"]
