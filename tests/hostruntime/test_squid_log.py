"""What is told of Squid's last words, from logs as Squid 5 and 6 write them."""

from __future__ import annotations

from hostruntime.network.squid_log import error_summary

NOISE = "".join(
    f"2026/11/29 16:39:{second:02} kid1| WARNING: '::/0' is a subnetwork of '::', number {second}\n"
    for second in range(60)
)
ENDED = """\
2026/11/29 16:39:20 kid1| Starting Squid Cache version 5.7 for x86_64-pc-linux-gnu...
2026/11/29 16:39:20 kid1| Service Name: squid
2026/11/29 16:39:20 kid1| commBind Cannot bind socket FD 17 to 127.0.0.1:13128: (98) Address in use
2026/11/29 16:39:20 kid1| FATAL: The external_acl_type helpers are crashing too rapidly!

2026/11/29 16:39:20 kid1| Squid Cache (Version 5.7): Terminated abnormally.
CPU Usage: 0.042 seconds = 0.026 user + 0.016 sys
Maximum Resident Size: 103152 KB
Page faults with physical i/o: 0
"""


def test_what_was_fatal_comes_first_and_warnings_last() -> None:
    said = error_summary(ENDED + NOISE)
    assert said.startswith(
        "FATAL: The external_acl_type helpers are crashing too rapidly! "
        "commBind Cannot bind socket FD 17 to 127.0.0.1:13128: (98) Address in use WARNING: "
    )
    assert len(said) <= 1000


def test_what_was_tried_again_is_told_once() -> None:
    said = error_summary(ENDED * 5)
    assert said.count("FATAL") == said.count("commBind") == 1
    assert "CPU Usage" not in said
    assert "Starting" not in said


SIX = """\
2026/11/29 17:14:51 kid1| ERROR: setrlimit: RLIMIT_NOFILE: (1) Operation not permitted
2026/11/29 17:14:51 kid1| Starting Squid Cache version 6.13 for x86_64-pc-linux-gnu...
2026/11/29 17:14:51 kid1| ERROR: commBind Cannot bind socket FD 17 to 127.0.0.1:13128: (98) In use
    listening port: ask
2026/11/29 17:14:51 kid1| WARNING: external_acl_type #Hlpr1 exited
"""


def test_a_line_has_what_is_indented_below_it() -> None:
    assert error_summary(SIX) == (
        "ERROR: commBind Cannot bind socket FD 17 to 127.0.0.1:13128: (98) In use listening port: "
        "ask ERROR: setrlimit: RLIMIT_NOFILE: (1) Operation not permitted "
        "WARNING: external_acl_type #Hlpr1 exited"
    )


def test_a_silent_end_tells_nothing() -> None:
    assert error_summary("") == ""
