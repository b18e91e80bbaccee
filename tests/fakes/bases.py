"""The built-in bases of the fake host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from hostruntime.errors import HostFault, HostUnavailable, ImageNotFound
from hostruntime.wire.images import BaseInfo, Progress

BASES = ("debian-12", "python-3.12-bare", "python-3.12", "node-22")


class FakeBases:
    """Each with its state; those ``on_request`` are made as soon as somebody waits for them."""

    _up: Callable[[], None]

    def __init__(self) -> None:
        super().__init__()
        self.base_states = dict.fromkeys(BASES, "ready")
        self.on_request: set[str] = set()
        self.requested: list[str] = []
        # What is told while one is made, and then why that failed, or that the agent was killed.
        self.base_messages = ["Building it", "Step 1 of 1: pip install it"]
        self.base_error: str | None = None
        self.killed_while_making = 0
        self.between_messages: Callable[[], object] | None = None

    def is_bootable(self, name: str) -> bool:
        """Whether a base can be started: one that is made by itself is taken for made."""
        return name in self.base_states and (
            name not in self.on_request or self.base_states[name] == "ready"
        )

    def bases(self) -> list[BaseInfo]:
        """As the client."""
        self._up()
        return [self._base(name) for name in self.base_states]

    def _base(self, name: str) -> BaseInfo:
        state = self.base_states[name]
        error = self.base_error if state == "failed" else None
        progress = self.base_messages[0] if state == "building" else None
        base = BaseInfo(name, name.title(), f"What {name} is.", state, 1, error=error)
        return replace(base, on_request=name in self.on_request, progress=progress)

    def request_base(self, name: str) -> BaseInfo:
        """As the client."""
        self._up()
        if name not in self.base_states:
            raise ImageNotFound(f"There is no base {name}.")
        self.requested.append(name)
        if self.base_states[name] != "ready":
            self.base_states[name] = "building"
        return self._base(name)

    def ensure_base(self, name: str) -> Iterator[Progress]:
        """As the client."""
        self.request_base(name)
        for number, message in enumerate(self.base_messages, start=1):
            if number > 1 and self.killed_while_making:
                self.killed_while_making -= 1
                raise HostUnavailable("The host agent does not answer.")
            yield Progress("progress", message)
            if self.between_messages is not None:
                self.between_messages()
        if self.base_error is not None:
            self.base_states[name] = "failed"
            raise HostFault(self.base_error)
        self.base_states[name] = "ready"
        yield Progress("done")
