"""What is asked of the kernel, on a machine that has a lot of everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MOUNTS = 3000
ASKED = """
import sys, time
from pathlib import Path
from hostruntime.host import kernel

def fewest(job):
    spent = []
    for _ in range(5):
        before = time.thread_time()
        job()
        spent.append(time.thread_time() - before)
    return min(spent)

top = Path(sys.argv[1])
for number in range(int(sys.argv[2])):
    (top / f"other {number}").mkdir()
    kernel.mount("orkestr-test", top / f"other {number}", "tmpfs", 0, "size=4k")
mine = top / "my own"
mine.mkdir()
kernel.mount("orkestr-test", mine, "tmpfs", 0, "size=4k")
(mine / "in").mkdir()
kernel.mount("orkestr-test", mine / "in", "tmpfs", 0, "size=4k")
assert kernel.mount_points_under(mine) == [mine / "in", mine]
assert kernel.mount_points_under(top / "other 1") == [top / "other 1"]
table = Path("/proc/self/mountinfo")
ours = fewest(lambda: kernel.mount_points_under(mine))
print(ours / fewest(lambda: table.read_bytes().splitlines()))
"""


IDMAP = """
import array, fcntl, os, resource, sys
from pathlib import Path
from hostruntime.host import kernel

NS_GET_OWNER_UID = 0xB704  # ioctl_ns(2)

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    dumpable = Path("/proc/self/mem").stat().st_uid
    return dumpable, [line for line in lines if line.startswith(("Uid", "Gid", "Cap"))]

creator = int(sys.argv[1])
extents = [(0, 1_000_000, 65_536), (70_000, 0, 1)]
kernel.create_user_namespace(extents, creator)
was = own()
before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
before += resource.getrusage(resource.RUSAGE_SELF).ru_minflt
namespace = kernel.create_user_namespace(extents, creator)
after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
after += resource.getrusage(resource.RUSAGE_SELF).ru_minflt
assert not Path(f"/proc/self/task/{os.getpid()}/children").read_text(), "nobody is left"
assert own() == was
fcntl.ioctl(namespace, NS_GET_OWNER_UID, owner := array.array("I", [0]))
assert owner[0] == creator, owner
os.setns(namespace, os.CLONE_NEWUSER)
maps = [Path(f"/proc/self/{name}").read_text().split() for name in ("uid_map", "gid_map")]
assert maps == [["0", "1000000", "65536", "70000", "0", "1"]] * 2, maps
print(after - before)
"""


@pytest.mark.host
@pytest.mark.parametrize("creator", ["0", "1000000"])
def test_a_user_namespace_takes_no_copy_of_the_process(creator: str) -> None:
    """Of each page that is written to afterwards, the kernel makes a copy: 450 for each start."""
    done = subprocess.run([sys.executable, "-c", IDMAP, creator], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20


@pytest.mark.host
def test_finding_ones_mounts_among_thousands_costs_little_more_than_reading_them(
    tmp_path: Path,
) -> None:
    """Every start and end of a container does it, so that all of them would cost the square."""
    alone = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", ASKED]
    done = subprocess.run([*alone, tmp_path, str(MOUNTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4
