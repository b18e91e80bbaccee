"""What volumes are told to be: damaged only if they are; and a new agent lets go of all."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostruntime.errors import HostFault, VolumeDamaged
from hostruntime.host.paths import Instance, StatePaths
from hostruntime.host.run import CommandFailed, Completed
from hostruntime.image.trash import Trash
from hostruntime.volume import store as module
from hostruntime.volume.store import VolumeStore
from hostruntime.wire.volumes import AttachVolume

VOLUME = AttachVolume("vol_1", 256)
WITH_A_FILE_SYSTEM = bytes(1024 + 0x38) + b"\x53\xef"


@pytest.fixture
def store(tmp_path: Path) -> VolumeStore:
    paths = StatePaths(tmp_path).ensure()
    return VolumeStore(paths, Instance(7), Trash(paths))


def refusal(store: VolumeStore) -> HostFault:
    with pytest.raises((HostFault, VolumeDamaged)) as refused:
        store.attach(VOLUME)
    assert str(store.paths.root) not in refused.value.detail
    return refused.value  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("status", "content", "kind"),
    [
        pytest.param(4, WITH_A_FILE_SYSTEM, VolumeDamaged, id="errors are left"),
        pytest.param(8, b"", VolumeDamaged, id="there is no file system"),
        pytest.param(8, WITH_A_FILE_SYSTEM, HostFault, id="no memory"),
        pytest.param(12, WITH_A_FILE_SYSTEM, HostFault, id="an I/O error"),
        pytest.param(-9, WITH_A_FILE_SYSTEM, HostFault, id="it was killed"),
        pytest.param(None, WITH_A_FILE_SYSTEM, HostFault, id="it hangs"),
    ],
)
def test_one_that_could_not_be_checked_is_not_called_damaged(
    store: VolumeStore,
    monkeypatch: pytest.MonkeyPatch,
    status: int | None,
    content: bytes,
    kind: type[Exception],
) -> None:
    (store.paths.volumes / "vol_1.ext4").write_bytes(content)

    def run(argv: list[str], **_: object) -> Completed:
        if status is None:
            raise CommandFailed(argv, "took too long")
        return Completed(tuple(argv), status, b"", f"e2fsck: {argv[-1]}".encode())

    monkeypatch.setattr(module, "run", run)
    assert type(refusal(store)) is kind


def test_one_that_cannot_be_unmounted_keeps_no_other_frozen(
    store: VolumeStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mounts, thawed, detached = tmp_path / "mounts", list[str](), list[str]()
    for name in ("vol_1", "vol_2", "vol_3"):
        (mounts / name).mkdir(parents=True)

    def detach(_: VolumeStore, volume_id: str) -> None:
        detached.append(volume_id)
        if volume_id == "vol_1":
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(VolumeStore, "_mounts", mounts)
    monkeypatch.setattr(VolumeStore, "detach", detach)
    monkeypatch.setattr(module, "_thaw", lambda point: thawed.append(point.name))
    (store.paths.volumes / ".vol_4.copy").touch()
    store.recover({"vol_3": "sbx_1"})
    assert thawed == ["vol_1", "vol_2", "vol_3"]
    assert detached == ["vol_1", "vol_2"]
    assert list(store.paths.volumes.iterdir()) == []
