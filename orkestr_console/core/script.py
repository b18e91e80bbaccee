"""Shell scripts that people submit: a step of a recipe, or a command in a sandbox.

A leaf module, shared by REST, console and MCP. Line ends become the shell's (a file written on
Windows, split at its line feeds, leaves a CR at the end of each step), and text written for another
tool gets an error with what to write here.
"""

from __future__ import annotations

import re

from orkestr_console.core.text import INVISIBLE, code_point, position_text

# The shell gets it as more than one argument: see hostruntime.container.exec.shell_argv.
MAX_SCRIPT_BYTES = 256 * 1024
_DISK = "everything that a step writes to the disk is in the image"
_FILES_ALONE = "an image holds files and variables alone; give the command to a sandbox's exec"
# The instructions of a Dockerfile (docs.docker.com, "Dockerfile reference"), and their
# equivalents here.
DOCKERFILE_ADVICE = {
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
_INSTRUCTION = re.compile(rf"(?:[ \t]*(?:#.*)?\n)*[ \t]*({'|'.join(DOCKERFILE_ADVICE)})[ \t]+\S")
_PROMPT = re.compile(r"\s*\$[ \t]+\S")


def usable_script(script: str) -> str:
    """``script`` in the shell's form. Raises ``ValueError`` if it is not a valid script."""
    script = unix_lines(script)
    if (at := script.find("\0")) >= 0:
        raise ValueError(
            f"must not contain NUL characters; take out \\0, {position_text(script, at)}."
        )
    if not script.strip():
        raise ValueError("is blank; remove it or write a command.")
    if not INVISIBLE.sub("", script).strip():
        characters = ", ".join(
            sorted({code_point(character) for character in INVISIBLE.findall(script)})
        )
        raise ValueError(f"has characters that cannot be seen ({characters}) and no others.")
    if (size := len(script.encode())) > MAX_SCRIPT_BYTES:
        raise ValueError(
            f"has {size:,} bytes, and may have {MAX_SCRIPT_BYTES:,}. "
            "Split it, or fetch a script and run that."
        )
    return script


def usable_step(step: str) -> str:
    """The same for a step, which must not be a line of a Dockerfile or of a terminal."""
    step = usable_script(step)
    if match := _INSTRUCTION.match(step):
        word = match[1]
        raise ValueError(
            f"begins with {word}, as in a Dockerfile. Instead: {DOCKERFILE_ADVICE[word]}."
        )
    if _PROMPT.match(step):
        raise ValueError("begins with a terminal's prompt, '$'; write what follows it alone.")
    return step


def unix_lines(text: str) -> str:
    """``text`` with CR LF line ends converted to LF."""
    return text.replace("\r\n", "\n").removesuffix("\r")
