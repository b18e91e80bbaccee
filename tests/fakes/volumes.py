"""The part of the host agent in memory that is about volumes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from hostruntime.errors import HostError, VolumeInUse, VolumeMissing
from hostruntime.wire.volumes import AttachVolume, VolumeInfo

if TYPE_CHECKING:
    from tests.fakes.host import FakeSandbox


class FakeVolumes:
    """``HostClient``'s part about volumes; nothing is on them but what is used."""

    lock: threading.Condition
    _up: Callable[[], None]
    booted: Mapping[str, FakeSandbox]
    persisted: dict[str, VolumeInfo]
    # What the next sandbox with a volume is refused with.
    volume_fails: HostError | None = None

    def volumes(self) -> list[VolumeInfo]:
        """As the client."""
        self._up()
        return [replace(info, sandbox=self.holder(key)) for key, info in self.persisted.items()]

    def delete_volume(self, volume_id: str) -> None:
        """As the client."""
        self._up()
        with self.lock:
            if self.holder(volume_id) is not None:
                raise VolumeInUse("A sandbox has it.")
            self.persisted.pop(volume_id, None)

    def holder(self, volume_id: str) -> str | None:
        """The sandbox that has a volume."""
        boxes = [box.info for box in self.booted.values() if box.info.state == "running"]
        return next((info.id for info in boxes if info.volume == volume_id), None)

    def attach(self, request: AttachVolume) -> None:
        """What a create does about its volume."""
        if self.volume_fails is not None:
            raise self.volume_fails
        if self.holder(request.id) is not None:
            raise VolumeInUse("A sandbox has it.")
        if request.id not in self.persisted and not request.new:
            raise VolumeMissing("It is gone.")
        self.persisted.setdefault(request.id, VolumeInfo(request.id, request.size_mb, 3_000_000))
