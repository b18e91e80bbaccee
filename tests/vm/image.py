"""Disks: a stock machine of a release, and on a copy of it this tree, ready for `make run`.

A disk is one ext4 file system in a sparse file, without a boot loader: the emulator is handed the
kernel that was installed on it.  What takes long is made at this machine's speed and kept:

``system.img``
    what Debian's installer would have made (`important` and its recommendations), an ssh server,
    a person with sudo
``product.img``
    that, with a clone of the commit in the person's home, and what the product's own bootstrap
    installs and base images that the product made here
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from hostruntime.build.bases import BASES
from hostruntime.host.run import run
from tests.vm import sources
from tests.vm.chroot import inside, mounted, usable
from tests.vm.places import TREE, Places, VmError
from tests.vm.releases import Release

PERSON = "dev"
HOME = f"home/{PERSON}"
CLONE = f"{HOME}/orkestr"
DISK = "16G"
# A machine that one logs in to; then what the README says a person has.
PACKAGES = (
    *("linux-image-amd64", "initramfs-tools", "systemd-sysv", "dbus", "libpam-systemd"),
    *("systemd-timesyncd", "apparmor", "sudo", "openssh-server", "ca-certificates"),
    *("git", "make"),
)
# Not what the emulated machine lacks: a small archive is unpacked in seconds, not half a minute.
BOOT_MODULES = ("virtio_pci", "virtio_blk", "ext4")
HOSTNAME = "orkestr-vm"
# Of its own accord nothing in there asks the network for anything while a test runs.
QUIET = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "man-db.timer", "e2scrub_all.timer"),
    *("systemd-timesyncd.service", "dpkg-db-backup.timer", "exim4.service"),
)
# QEMU's user network (-netdev user) has these addresses.
NETWORK = """\
[Match]
Name=en* eth*
[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
DNS=10.0.2.3
"""
_QUICK = 300.0
_LONG = 3600.0

Say = Callable[[str], None]


class Disks:
    """The disks of one release in its directory."""

    def __init__(self, places: Places, release: Release, say: Say) -> None:
        self._release = release
        self._places = places
        self._say = say
        self.directory = places.of(release.codename)
        self.directory.mkdir(exist_ok=True)
        self.system = self.directory / "system.img"
        self.product = self.directory / "product.img"
        self._mountpoint = self.directory / "root"

    @property
    def kernel(self) -> Path:
        """The kernel that the system disk has installed."""
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """Its first file system."""
        return self.directory / "initrd.img"

    # The system -------------------------------------------------------------------------

    def make_system(self) -> None:
        """Make the stock machine anew. Raises CommandFailed, SourcesError."""
        staged = self.system.with_suffix(".new")
        _blank(staged)
        with mounted(staged, self._mountpoint) as root:
            self._debootstrap(root)
            self._configure(root)
            self._keep_kernel(root)
        staged.rename(self.system)

    def _debootstrap(self, root: Path) -> None:
        here, wanted = sources.codename_here(), self._release.codename
        files = []
        for name, text in sources.debian_sources(sources.apt_files(), here, wanted):
            files.append(self.directory / name)
            files[-1].write_text(text)
        settings = self.directory / "apt.conf"
        settings.write_text(sources.fetching_settings() + 'APT::Install-Recommends "true";\n')
        boot = "$1/etc/initramfs-tools"
        early = (
            f"mkdir -p {boot}/conf.d; echo MODULES=list >{boot}/conf.d/vm; "
            f"printf '%s\\n' {' '.join(BOOT_MODULES)} >{boot}/modules"
        )
        run(
            [
                *("mmdebstrap", "--mode=root", "--variant=important", f"--aptopt={settings}"),
                *(f"--include={','.join(PACKAGES)}", f"--essential-hook={early}"),
                *("--skip=cleanup/apt/lists", wanted, str(root)),
                *map(str, files),
            ],
            timeout=_LONG,
            on_line=self._say,
        )

    def _configure(self, root: Path) -> None:
        _write(root / "etc/hostname", f"{HOSTNAME}\n")
        _write(root / "etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {HOSTNAME}\n")
        _write(root / "etc/fstab", "/dev/vda / ext4 errors=remount-ro 0 1\n")
        _write(root / "etc/systemd/network/10-vm.network", NETWORK)
        _write(root / "etc/resolv.conf", "nameserver 10.0.2.3\n")
        _lend_settings(root)
        inside(root, ["update-ca-certificates"], _QUICK)
        inside(root, ["useradd", "-m", "-s", "/bin/bash", "-G", "sudo", PERSON], _QUICK)
        (root / HOME).chmod(0o700)
        _write(root / "etc/sudoers.d/vm", f"{PERSON} ALL=(ALL) NOPASSWD: ALL\n")
        inside(root, ["systemctl", "-q", "enable", "systemd-networkd", "ssh"], _QUICK)
        inside(root, ["systemctl", "-q", "mask", *QUIET], _QUICK)
        self._let_in(root, "root", "0:0")
        self._let_in(root, HOME, f"{PERSON}:{PERSON}")

    def _let_in(self, root: Path, home: str, owner: str) -> None:
        if not self._places.key.exists():
            run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._places.key)],
                timeout=_QUICK,
            )
        directory = root / home / ".ssh"
        directory.mkdir(exist_ok=True)
        directory.chmod(0o700)
        public = self._places.key.with_suffix(".pub").read_text()
        _write(directory / "authorized_keys", public)
        inside(root, ["chown", "-R", owner, f"/{home}/.ssh"], _QUICK)

    def _keep_kernel(self, root: Path) -> None:
        for pattern, kept in (("vmlinuz-*", self.kernel), ("initrd.img-*", self.initrd)):
            found = sorted((root / "boot").glob(pattern))
            if not found:
                raise VmError(f"{self._release.title} came without /boot/{pattern}")
            shutil.copyfile(found[-1], kept)

    # The product ------------------------------------------------------------------------

    def make_product(self, commit: str, python: Path | None, bases: Path | None) -> None:
        """Copy the system and put the commit on it, bootstrapped, with base images.

        ``python`` is a prefix of this machine's to copy in; ``bases`` an image store
        (:mod:`hostruntime.image.store`).  Raises CommandFailed.
        """
        staged = self.product.with_suffix(".new")
        run(["cp", "--sparse=always", str(self.system), str(staged)], timeout=_LONG)
        with mounted(staged, self._mountpoint) as root, usable(root):
            if python is not None:
                self._lend_python(root, python)
            self._clone(root, commit)
            self._bootstrap(root)
            if bases is not None:
                self._lend_bases(root, bases)
        staged.rename(self.product)

    def _lend_python(self, root: Path, prefix: Path) -> None:
        """A Python where bootstrap.sh looks, and its library where its scripts find it."""
        place = f"{HOME}/.pyenv/versions/{prefix.name}"
        (root / place).parent.mkdir(parents=True)
        run(["cp", "-a", str(prefix), str(root / place)], timeout=_QUICK)
        inside(root, ["chown", "-R", f"{PERSON}:{PERSON}", f"/{HOME}/.pyenv"], _QUICK)
        # Linked with the prefix's own place of this machine as its run path (ld.so(8)).
        for library in (prefix / "lib").glob("libpython3*.so*"):
            shutil.copy2(library, root / "usr/local/lib", follow_symlinks=False)
        inside(root, ["ldconfig"], _QUICK)

    def _clone(self, root: Path, commit: str) -> None:
        place = root / CLONE
        run(["git", "clone", "-q", "--no-hardlinks", "-n", str(TREE), str(place)], timeout=_QUICK)
        run(["git", "-C", str(place), "checkout", "-q", "-B", "main", commit], timeout=_QUICK)
        run(["git", "-C", str(place), "remote", "remove", "origin"], timeout=_QUICK)
        inside(root, ["chown", "-R", f"{PERSON}:{PERSON}", f"/{CLONE}"], _QUICK)

    def _bootstrap(self, root: Path) -> None:
        command = f"cd /{CLONE} && orkestr_console/runner/bootstrap.sh run"
        # `su -`: what a person has who has just logged in, and nothing of this process's.
        inside(root, ["su", "-", PERSON, "-c", command], _LONG, on_line=self._say)

    def _lend_bases(self, root: Path, images: Path) -> None:
        target = root / CLONE / "var/host/images"
        target.mkdir(parents=True)
        for directory, mode in (
            (target, 0o700),
            (target.parent, 0o700),
            (target.parents[1], 0o755),
        ):
            directory.chmod(mode)
        # A base is a link and what it leads to (hostruntime.image.store).
        links = [images / name for name, base in BASES.items() if not base.on_request]
        names = [str(path) for link in links for path in (link.name, link.readlink())]
        packing = ["tar", "-C", str(images), "--xattrs", "--exclude=*@*/users", "-cf", "-", *names]
        unpacking = ["tar", "-C", str(target), "--xattrs", "--numeric-owner", "-xpf", "-"]
        with subprocess.Popen(packing, stdout=subprocess.PIPE) as packed:
            unpacked = subprocess.run(unpacking, stdin=packed.stdout, check=False)
        if packed.returncode or unpacked.returncode:
            raise VmError(f"the base images in {images} could not be copied")


def _blank(disk: Path) -> None:
    disk.unlink(missing_ok=True)
    run(["truncate", "-s", DISK, str(disk)], timeout=_QUICK)
    run(["mke2fs", "-q", "-t", "ext4", "-F", "-L", "root", str(disk)], timeout=_QUICK)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _lend_settings(root: Path) -> None:
    """This machine's certificates, and its ways to the package registries."""
    extra = Path("/usr/local/share/ca-certificates")
    shutil.copytree(extra, root / extra.relative_to("/"), dirs_exist_ok=True)
    _write(root / "etc/apt/apt.conf.d/99fetching", sources.fetching_settings())
    pip, npm = sources.ETC / "pip.conf", sources.ETC / "npmrc"
    if pip.is_file():
        _write(root / "etc/pip.conf", sources.pip_settings(pip.read_text()))
    if npm.is_file():
        _write(root / "etc/npmrc", npm.read_text())
