"""The filter, run by a small interpreter of classic BPF: what it lets through and what not."""

from __future__ import annotations

import errno
import platform
import struct
from functools import cache
from pathlib import Path

import pytest

from hostruntime.container import seccomp
from hostruntime.host import kernel
from hostruntime.host.ids import HIGH_IDS, ID_BASE, ID_COUNT, IDS_PER_SLOT

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86-64")

ALLOW, ERRNO = 0x7FFF_0000, 0x0005_0000
X86_64, I386, X32 = 0xC000_003E, 0x4000_0003, 0x4000_0000
_JUMPS = {0x15: int.__eq__, 0x25: int.__gt__, 0x35: int.__ge__}


@cache
def program() -> list[tuple[int, int, int, int]]:
    return list(struct.iter_unpack("=HBBI", seccomp.program()))


def verdict(number: int, *arguments: int, abi: int = X86_64) -> int:
    """What the filter answers (bpf(4), seccomp(2)): 0 for allowed, else the errno."""
    values = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("=IIQ6Q", number & 0xFFFF_FFFF, abi, 0, *values)
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, k = program()[at]
        at += 1
        if code == 0x20:  # load a word
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif code == 0x54:  # and
            accumulator &= k
        elif code == 0x05:  # jump
            at += k
        elif code in _JUMPS:
            at += if_true if _JUMPS[code](accumulator, k) else if_false
        elif code == 0x06:  # return
            return 0 if k == ALLOW else k & 0xFFFF if k & 0xFFFF_0000 == ERRNO else -1
        else:
            raise AssertionError(f"an instruction {code:#x} that libseccomp did not use before")


@pytest.mark.parametrize("number", [0, 1, 9, 39, 59, 61, 101, 161, 202, 257, 303, 434, 437, 451])
def test_the_usual_calls_are_allowed(number: int) -> None:
    assert verdict(number) == 0


# setuid, setreuid, setresuid: of x86-64, then of i386 (setuid32 …).
_BECOMING = [(105, X86_64), (113, X86_64), (117, X86_64), (213, I386), (203, I386), (208, I386)]
_FAR = [65_536, 65_537, 70_000, 1_234_567, 1 << 30, 2**31 - 2]


@pytest.mark.parametrize(("number", "abi"), _BECOMING)
def test_no_process_becomes_one_of_the_ids_that_all_containers_share(number: int, abi: int) -> None:
    for far in (*_FAR, *(far | 1 << 32 for far in _FAR), *(far | 2**64 - 2**32 for far in _FAR)):
        assert verdict(number, far, 0xFFFF_FFFF, 0, abi=abi) == errno.EINVAL, far
    for near in (0, 1, 1000, 65_534, 65_535):
        assert verdict(number, near, near, near, abi=abi) == 0, near


@pytest.mark.parametrize(("number", "abi"), [one for one in _BECOMING if one[0] not in {105, 213}])
def test_a_real_id_may_stay_as_it_is(number: int, abi: int) -> None:
    assert verdict(number, 0xFFFF_FFFF, 1000, 0xFFFF_FFFF, abi=abi) == 0


def test_ids_of_files_alone_are_apart_from_every_slots() -> None:
    inside, outside, count = HIGH_IDS
    assert inside == IDS_PER_SLOT
    assert outside >= ID_BASE + ID_COUNT
    assert outside + count < 2**32 - 1
    # LXC keeps the next one, in a C int, for itself.
    assert inside + count < 2**31


@pytest.mark.parametrize("number", [165, 166, 155, 308, 246, 175, 321, 298, 323, 250, 304, 169])
def test_what_nobody_needs_is_forbidden(number: int) -> None:
    assert verdict(number) == errno.EPERM
    assert verdict(number, *[2**64 - 1] * 6) == errno.EPERM


@pytest.mark.parametrize("number", [206, *range(425, 434), 435, 442, 447])
def test_what_programs_do_without_is_not_there(number: int) -> None:
    assert verdict(number) == errno.ENOSYS


@pytest.mark.parametrize("bit", range(64))
def test_a_new_namespace_is_refused_whatever_else_is_asked_for(bit: int) -> None:
    clone, unshare, namespaces = 56, 272, 0x7E02_0000
    flag = 1 << bit
    assert verdict(clone, flag | 17) == (errno.EPERM if flag & namespaces else 0)
    expected = errno.EPERM if flag & (namespaces | 0x80) else 0
    assert verdict(unshare, flag) == expected
    for also in (0x1000_0000, 0x2_0000):
        assert verdict(clone, flag | also) == verdict(unshare, flag | also) == errno.EPERM


@pytest.mark.parametrize("family", range(1, 64))
def test_pairs_of_sockets_are_of_one_family(family: int) -> None:
    expected = 0 if family == 1 else errno.EAFNOSUPPORT
    assert verdict(53, family) == expected
    assert verdict(360, family, abi=I386) == expected
    assert verdict(53, family | 1 << 35) == errno.EAFNOSUPPORT


@pytest.mark.parametrize("family", range(64))
def test_sockets_are_of_the_four_usual_families(family: int) -> None:
    expected = 0 if family in (1, 2, 10, 16) else errno.EAFNOSUPPORT
    assert verdict(41, family) == expected
    assert verdict(359, family, abi=I386) == expected
    assert verdict(41, family | 1 << 35) == errno.EAFNOSUPPORT, "no bit above gets it through"


@pytest.mark.parametrize("protocol", range(32))
def test_netlink_is_for_routes_and_for_looking_at_sockets(protocol: int) -> None:
    netlink, inet = 16, 2
    expected = 0 if protocol in (0, 4) else errno.EPROTONOSUPPORT
    assert verdict(41, netlink, 3, protocol) == expected
    assert verdict(359, netlink, 3, protocol, abi=I386) == expected
    assert verdict(41, netlink | 1 << 40, 3, protocol) != 0, "no bit above gets it through"
    if protocol:
        assert verdict(41, netlink, 3, protocol | 1 << 35) == expected
    assert verdict(41, inet, 2, protocol) == 0


@pytest.mark.parametrize("protocol", [0, 1, 6, 17, 33, 58, 132, 136, 255, 262])
def test_protocols_that_are_modules_are_not_to_be_had(protocol: int) -> None:
    expected = errno.EPROTONOSUPPORT if protocol in (33, 132, 136, 262) else 0
    for family in (2, 10):
        assert verdict(41, family, 1, protocol) == expected
        assert verdict(41, family, 1, protocol | 1 << 40) == expected


def test_calls_that_nobody_has_looked_at_are_not_there() -> None:
    for abi in (X86_64, I386):
        allowed = {number for number in range(440, 600) if verdict(number, abi=abi) == 0}
        assert max(allowed) == 466
        assert not allowed & {457, 458, 459, 460, 461}
        assert {451, 452, 454, 462, 463} <= allowed
    assert verdict(0x3FFF_FFFF) == verdict(0xFFFF_FFFF) == errno.ENOSYS


@pytest.mark.parametrize("above", [0, 1 << 32, 1 << 63])
def test_input_is_not_put_into_terminals(above: int) -> None:
    assert verdict(16, 0, 0x5412 | above) == errno.EPERM
    assert verdict(16, 0, 0x541C | above) == verdict(16, 0, 0x5423 | above) == errno.EPERM
    assert verdict(16, 0, 0x5401 | above) == verdict(16, 0, 0x5413 | above) == 0


def test_the_other_abis_lead_to_the_same_place() -> None:
    assert verdict(310, 0x1000_0000, abi=I386) == errno.EPERM, "unshare"
    assert verdict(21, abi=I386) == errno.EPERM, "mount"
    assert verdict(435, abi=I386) == errno.ENOSYS, "clone3"
    assert verdict(102, 1, abi=I386) == errno.EAFNOSUPPORT, "socketcall's socket"
    assert verdict(102, 3, abi=I386) == 0, "socketcall's connect"
    assert verdict(20, abi=I386) == 0, "getpid"
    assert verdict(39 | X32) == errno.ENOSYS, "x32, which no Debian has programs for"
    assert verdict(39, abi=0xC000_00B7) != 0, "an ABI that this processor cannot have"


def test_a_filter_that_is_not_installed_is_not_passed_over() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        kernel.SyscallFilter(b"").install()


def test_the_profile_has_a_line_for_each_rule_and_is_written_once(tmp_path: Path) -> None:
    path = seccomp.write_profile(tmp_path)
    lines = path.read_text().splitlines()
    assert lines[:3] == ["2", "denylist", "[all]"]
    assert len(lines) - 3 == len(list(seccomp.rules())) == len(set(lines[3:]))
    assert f"ioctl errno 1 [1,{0x5412},SCMP_CMP_MASKED_EQ,{0xFFFF_FFFF}]" in lines
    written = path.stat().st_mtime_ns
    assert seccomp.write_profile(tmp_path) == path
    assert path.stat().st_mtime_ns == written
