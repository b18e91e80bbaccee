"""Examples of the calls: for curl made here, for the official SDK and command line written here.

``tests/api/test_samples.py`` asks the official clients whether they have what is used.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from orkestr_console.http.describing import BYTES, EVENTS, Operation
from orkestr_console.openapi.calls import Call

SANDBOX = 'sandbox = Sandbox.get("{sandbox_id}")\n'
IMPORT = "from orkestr import {}\n\n"

# By the names of the calls; the import comes with the first name in capitals.
PYTHON = {
    "create_sandbox": 'sandbox = Sandbox.create(template="python-3.12", timeout_seconds=600)\n'
    "print(sandbox.id)",
    "list_sandboxes": 'for sandbox in Sandbox.list(status="running"):\n    print(sandbox.id)',
    "get_limits": "limits = Sandbox.limits()\nprint(limits.max_concurrent)",
    "get_sandbox": SANDBOX + "print(sandbox.status)",
    "terminate_sandbox": SANDBOX + "sandbox.terminate()",
    "set_timeout": SANDBOX + "sandbox.set_timeout(1800)",
    "pause_sandbox": SANDBOX + "sandbox.pause()",
    "resume_sandbox": 'sandbox = Sandbox.resume("{sandbox_id}")',
    "exec_command": SANDBOX + "result = sandbox.exec(\"python3 -c 'print(6 * 7)'\")\n"
    "print(result.stdout)",
    "start_command": SANDBOX
    + 'server = sandbox.exec("python3 -m http.server 8000", background=True)',
    "list_commands": SANDBOX + "for command in sandbox.commands():\n    print(command.status)",
    "get_command": SANDBOX + "command = sandbox.commands()[0]\ncommand.refresh()",
    "kill_command": SANDBOX + "sandbox.commands()[0].kill()",
    "read_logs": SANDBOX + "print(sandbox.commands()[0].logs(offset=0).content)",
    "run_code": SANDBOX + 'print(sandbox.run_code("6 * 7").text)',
    "create_context": SANDBOX + 'context = sandbox.create_code_context(cwd="/workspace")',
    "list_contexts": SANDBOX + "for context in sandbox.code_contexts():\n    print(context.id)",
    "restart_context": SANDBOX + "sandbox.code_contexts()[0].restart()",
    "remove_context": SANDBOX + "sandbox.code_contexts()[0].remove()",
    "read_path": SANDBOX + 'print(sandbox.files.read("/workspace/hello.txt"))',
    "write_file": SANDBOX + 'sandbox.files.write("/workspace/hello.txt", "Hello\\n")',
    "delete_path": SANDBOX + 'sandbox.files.delete("/workspace/hello.txt")',
    "mkdir": SANDBOX + 'sandbox.files.mkdir("/workspace/data")',
    "move": SANDBOX + 'sandbox.files.move("/workspace/a.txt", "/workspace/b.txt")',
    "stat": SANDBOX + 'print(sandbox.files.stat("/workspace/hello.txt").size)',
    "write_batch": SANDBOX + 'sandbox.files.write_batch([("/workspace/a.txt", "A\\n")])',
    "presign_upload": SANDBOX + 'address = sandbox.files.presign_upload("/workspace/large.bin")',
    "presign_download": SANDBOX
    + 'address = sandbox.files.presign_download("/workspace/large.bin")',
    "get_metrics": SANDBOX + "print(sandbox.metrics().memory.usage_bytes)",
    "create_snapshot": SANDBOX + 'snapshot = sandbox.snapshot("with-data")',
    "list_snapshots": "for snapshot in Snapshot.list():\n    print(snapshot.id)",
    "get_snapshot": 'snapshot = Snapshot.get("{snapshot_id}")',
    "delete_snapshot": 'Snapshot.delete("{snapshot_id}")',
    "create_webhook": "webhook = Webhook.create(\n"
    '    "https://hooks.example.com/orkestr", event_types=["sandbox.expired"]\n)',
    "list_webhooks": "for webhook in Webhook.list():\n    print(webhook.url)",
    "delete_webhook": 'Webhook.delete("{webhook_id}")',
    "enable_webhook": 'Webhook.enable("{webhook_id}")',
}

COMMAND_LINE = {
    "create_sandbox": "orkestr sbx create python-3.12 --timeout 600",
    "list_sandboxes": "orkestr sbx list --status running",
    "get_sandbox": "orkestr sbx info {sandbox_id}",
    "terminate_sandbox": "orkestr sbx kill {sandbox_id}",
    "pause_sandbox": "orkestr sbx pause {sandbox_id}",
    "resume_sandbox": "orkestr sbx resume {sandbox_id}",
    "exec_command": "orkestr sbx exec {sandbox_id} -- python3 -c 'print(6 * 7)'",
    "get_metrics": "orkestr sbx metrics {sandbox_id}",
    "get_account": "orkestr whoami",
    "list_tokens": "orkestr tokens list",
    "create_token": "orkestr tokens create laptop --expires-in-days 30",
    "delete_token": "orkestr tokens delete {token_id} --yes",
    "delete_current_token": "orkestr logout",
    "start_device_login": "orkestr login",
}

# An id that shows what belongs there.
IDS = {
    "sandbox_id": "sbx_01JZ8QX4",
    "template_id": "tmpl_01JZ8QX4",
    "snapshot_id": "snap_01JZ8QX4",
    "webhook_id": "whk_01JZ8QX4",
    "volume_id": "vol_01JZ8QX4",
    "command_id": "cmd_01JZ8QX4",
    "context_id": "ctx_01JZ8QX4",
    "token_id": "3f9a1c2b7d4e",
    "address": "eyJwYXRoIjoi",
}


def samples(call: Call, operation: Operation) -> list[dict[str, str]]:
    """The examples of a call, as documents have them: language, label and source."""
    found = [{"lang": "shell", "label": "curl", "source": curl(call, operation)}]
    if call.name in PYTHON:
        source = filled(PYTHON[call.name])
        name = next(name for name in ("Sandbox", "Snapshot", "Webhook", "Volume") if name in source)
        source = IMPORT.format(name) + source
        found.append({"lang": "python", "label": "Python", "source": source})
    if call.name in COMMAND_LINE:
        source = filled(COMMAND_LINE[call.name])
        found.append({"lang": "shell", "label": "Command line", "source": source})
    return found


def filled(text: str) -> str:
    """With ids in place of parameters."""
    for name, example in IDS.items():
        text = text.replace("{" + name + "}", example)
    return text


def curl(call: Call, operation: Operation) -> str:
    """A call of curl: what is required, and the example's body."""
    url = f"$ORKESTR_BASE_URL{filled(call.path)}"
    required = [each for each in operation.parameters if each.required and each.where == "query"]
    if required:
        url += "?" + "&".join(f"{each.name}={sample_of(each.schema)}" for each in required)
    lines = ["curl" if call.method == "GET" else f"curl -X {call.method}"]
    lines[0] += f' "{url}"'
    if call.scope:
        lines.append('-H "Authorization: Bearer $ORKESTR_API_KEY"')
    if operation.body is not None:
        lines.append("-H 'Content-Type: application/json'")
        lines.append(f"-d {shlex.quote(json.dumps(operation.example or {}))}")
    elif operation.reads == BYTES:
        lines.append("--upload-file large.bin")
    elif BYTES in operation.also:
        lines.append("-o large.bin")
    elif EVENTS in operation.also:
        lines[0] = lines[0].replace("curl", "curl -N", 1)
    return " \\\n  ".join(lines)


def sample_of(schema: Any) -> str:
    """A value of a required parameter."""
    examples = schema.get("examples") or [schema.get("minimum", "")]
    return str(examples[0])
