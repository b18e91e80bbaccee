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


@pytest.mark.host
def test_finding_ones_mounts_among_thousands_costs_little_more_than_reading_them(
    tmp_path: Path,
) -> None:
    """Every start and end of a container does it, so that all of them would cost the square."""
    alone = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", ASKED]
    done = subprocess.run([*alone, tmp_path, str(MOUNTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4
