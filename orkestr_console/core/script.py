"""What people may give a shell: a step of a recipe, or a command in a sandbox.

A leaf module, and the one rule of REST, console and MCP alike. Line ends become those of the shell
(a file written on Windows, split at its line feeds, leaves a CR at the end of each step), and what
was written for another tool is answered with what to write here.
"""

from __future__ import annotations

import re

from orkestr_console.core.text import STEERING, code_point, place

# The shell gets more than one argument of it: see hostruntime.container.exec.shell_argv.
LARGEST_SCRIPT = 256 * 1024
_DISK = "everything that a step writes to the disk is in the image"
_FILES_ALONE = "an image holds files and variables alone; give the command to a sandbox's exec"
# The instructions of a Dockerfile (docs.docker.com, "Dockerfile reference"), and what does that
# here.
INSTEAD = {
    "RUN": "write the command alone, without RUN",
    "ENV": "put variables into the template's 'env', which every step and sandbox then has",
    "ARG": "write the value where it is needed, or put it into the template's 'env'",
    "FROM": "what the recipe starts from is the template's 'base_template'",
    "COPY": "nothing comes in from outside by itself: fetch it (git clone, curl -fsSLO), or write "
    "it here with cat > FILE <<'END'",
    "ADD": "nothing comes in from outside by itself: fetch it with curl -fsSLO and unpack it, or "
    "write it here with cat > FILE <<'END'",
    "WORKDIR": "every step begins in /root: write cd DIRECTORY && COMMAND in the step itself",
    "USER": "every step is root's: write runuser -u NAME -- COMMAND for what another is to run",
    "SHELL": "every step is run by bash: write python3 -c, or another shell's name, in the step",
    "CMD": _FILES_ALONE,
    "ENTRYPOINT": _FILES_ALONE,
    "HEALTHCHECK": _FILES_ALONE,
    "STOPSIGNAL": _FILES_ALONE,
    "EXPOSE": "leave it out: nothing has to be declared of ports",
    "VOLUME": f"leave it out: {_DISK}, but for /workspace and /tmp",
    "LABEL": "leave it out: the template's name is its label",
    "MAINTAINER": "leave it out: the template knows who made it",
    "ONBUILD": "leave it out: a template's steps run once, when it is built",
}
_INSTRUCTION = re.compile(rf"(?:[ \t]*(?:#.*)?\n)*[ \t]*({'|'.join(INSTEAD)})[ \t]+\S")
_PROMPT = re.compile(r"\s*\$[ \t]+\S")


def usable_script(script: str) -> str:
    """``script`` as a shell wants it. Raises ``ValueError`` if it can be none."""
    script = unix_lines(script)
    if (at := script.find("\0")) >= 0:
        raise ValueError(f"must not contain NUL characters; take out \\0, {place(script, at)}.")
    if not script.strip():
        raise ValueError("is blank; remove it or write a command.")
    if not STEERING.sub("", script).strip():
        found = ", ".join(sorted({code_point(one) for one in STEERING.findall(script)}))
        raise ValueError(f"has characters that cannot be seen ({found}) and no others.")
    if (size := len(script.encode())) > LARGEST_SCRIPT:
        raise ValueError(
            f"has {size:,} bytes, and may have {LARGEST_SCRIPT:,}. "
            "Split it, or fetch a script and run that."
        )
    return script


def usable_step(step: str) -> str:
    """The same, and no line of a Dockerfile or of a terminal."""
    step = usable_script(step)
    if found := _INSTRUCTION.match(step):
        word = found[1]
        raise ValueError(f"begins with {word}, as in a Dockerfile. Instead: {INSTEAD[word]}.")
    if _PROMPT.match(step):
        raise ValueError("begins with a terminal's prompt, '$'; write what follows it alone.")
    return step


def unix_lines(text: str) -> str:
    """``text`` with lines that end in LF, of a text with lines that end in CR LF."""
    return text.replace("\r\n", "\n").removesuffix("\r")
