"""What can go wrong on a host, and how it crosses the agent's socket.

::

    HostError                    code, detail, HTTP status
     ├─ InvalidRequest           400 invalid_request     the caller asked for something malformed
     │   └─ CwdNotFound          400 cwd_not_found       the working directory does not exist
     ├─ NotFound                 404 not_found           no such sandbox, build, image or file
     │   ├─ ImageNotFound        404 image_not_found
     │   ├─ VolumeMissing        404 volume_missing      its data is not on this host (any more)
     │   └─ ContextNotFound      404 context_not_found   the sandbox has no such context
     ├─ Conflict                 409 conflict            it exists, but not in the right state
     │   ├─ ContainerGone        409 container_gone      the container is not running (any more)
     │   ├─ PortClosed           409 port_closed         nothing inside listens on the port
     │   ├─ VolumeInUse          409 volume_in_use       another sandbox has it
     │   ├─ VolumeDamaged        409 volume_damaged      its file system cannot be repaired
     │   ├─ FileConflict         409 file_conflict       e.g. a directory where a file is needed
     │   ├─ TextNotFound         409 text_not_found      to replace in a file
     │   ├─ InterpreterUnavailable 409 interpreter_unavailable   the image has no such kernel
     │   ├─ KernelFailed         409 kernel_failed       a kernel could not be started
     │   ├─ ContextBusy          409 context_busy        it runs something else all that time
     │   └─ TooManyContexts      409 too_many_contexts   of one sandbox
     ├─ FileTooLarge             413 file_too_large
     ├─ RangeNotSatisfiable      416 range_not_satisfiable   (+ ``size``) of the file in bytes
     ├─ ExecTimeout              408 exec_timeout        exceeded its time limit and was killed
     ├─ ExecKilled               409 exec_killed         killed by a signal (+ ``signal``)
     ├─ TooManyCommands          429 too_many_commands   (+ ``running``) of the caller's scope
     ├─ TooManyTransfers         429 too_many_transfers  into and out of one sandbox
     ├─ BuildFailed              409 build_failed        (+ ``reason``, ``step``)
     ├─ HostFull                 503 fleet_full_retry    no slot, memory or disk left; retry later
     ├─ HostUnavailable          503 host_unavailable    the agent does not respond
     │   └─ Held                 503 held                frozen until the host has space again
     └─ HostFault                500 internal            a bug or a broken machine

A leaf module: it imports nothing of the project.  ``detail`` is always a sentence that says what
was wrong and what to do about it.
"""
# ruff: noqa: N818 - the class names are the vocabulary of the contract, not "…Error"

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar


class HostError(Exception):
    """The base of every error that this package raises on purpose.

    ``code`` is the machine-readable name, ``status`` the HTTP status the agent answers with,
    ``detail`` the sentence for a person, ``extra`` further JSON-safe fields of the response.
    """

    code: ClassVar[str] = "host_error"
    status: ClassVar[int] = 500

    def __init__(self, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra: dict[str, Any] = extra

    def to_wire(self) -> dict[str, Any]:
        """The JSON body the agent answers with: ``{"code", "detail", …extra}``."""
        return {**self.extra, "code": self.code, "detail": self.detail}

    @staticmethod
    def from_wire(payload: Mapping[str, Any], status: int = 500) -> HostError:
        """Rebuild the error a peer sent; an unknown code becomes the closest class by status.

        ``message`` is accepted in place of ``detail``, as the exec stream's error frames use it.
        """
        code = str(payload.get("code", ""))
        detail = str(payload.get("detail") or payload.get("message") or f"The host said {status}.")
        extra = {
            k: v for k, v in payload.items() if k not in _RESERVED_FIELDS and isinstance(k, str)
        }
        cls = _by_code().get(code)
        if cls is None:
            cls = _BY_STATUS.get(status, HostFault)
            extra["host_code"] = code
        error = cls(detail)
        # Not as arguments: a peer can be hostile, and name one of them "self".
        error.extra |= extra
        return error


class InvalidRequest(HostError):
    """The request itself is wrong; retrying it unchanged cannot work."""

    code = "invalid_request"
    status = 400


class CwdNotFound(InvalidRequest):
    """The working directory of an exec is missing or is not a directory."""

    code = "cwd_not_found"


class NotFound(HostError):
    """No such object on this host."""

    code = "not_found"
    status = 404


class ImageNotFound(NotFound):
    """No such image in the image store."""

    code = "image_not_found"


class VolumeMissing(NotFound):
    """The host does not have the data of a volume that is not new."""

    code = "volume_missing"


class ContextNotFound(NotFound):
    """The sandbox has no context of the code interpreter with this id."""

    code = "context_not_found"


class Conflict(HostError):
    """The object exists but is not in a state that allows this."""

    code = "conflict"
    status = 409


class ContainerGone(Conflict):
    """The container is not running (any more)."""

    code = "container_gone"


class ContainerPaused(Conflict):
    """The container is paused; nothing runs in it until it is resumed."""

    code = "container_paused"


class PortClosed(Conflict):
    """No program in the container accepts connections to the port."""

    code = "port_closed"


class Exhausted(Conflict):
    """The container's own limits prevent one more process from starting, or kill it."""

    code = "sandbox_exhausted"


class NoSpace(Conflict):
    """The container's disk, or the tmpfs that holds the directory, is full."""

    code = "no_space"


class VolumeInUse(Conflict):
    """Another sandbox has the volume, or has not let go of it yet."""

    code = "volume_in_use"


class VolumeDamaged(Conflict):
    """The volume's file system is damaged; it was left as it is."""

    code = "volume_damaged"


class FileConflict(Conflict):
    """A file operation found the wrong kind of file (a directory, a device, an existing name)."""

    code = "file_conflict"


class TextNotFound(Conflict):
    """A file does not have the text that was to be replaced, or not as often as it was to be."""

    code = "text_not_found"


class InterpreterUnavailable(Conflict):
    """The image has no Jupyter kernel for the language."""

    code = "interpreter_unavailable"


class KernelFailed(Conflict):
    """A kernel of the image could not be started, or did not answer."""

    code = "kernel_failed"


class ContextBusy(Conflict):
    """A context runs something else, and did for as long as the caller would wait."""

    code = "context_busy"


class TooManyContexts(Conflict):
    """The sandbox has as many contexts as it may."""

    code = "too_many_contexts"


class FileTooLarge(HostError):
    """More bytes than the operation's cap."""

    code = "file_too_large"
    status = 413


class RangeNotSatisfiable(HostError):
    """A file has none of the bytes that were asked for; ``size`` is how many it has."""

    code = "range_not_satisfiable"
    status = 416

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        value = self.extra.get("size")
        return value if isinstance(value, int) else 0


class ExecTimeout(HostError):
    """A command exceeded its time limit; its whole process tree was killed."""

    code = "exec_timeout"
    status = 408


class ExecKilled(HostError):
    """A command was killed by a signal; ``signal`` is its number."""

    code = "exec_killed"
    status = 409

    @property
    def signal(self) -> int | None:
        """The number of the signal that ended the command, if known."""
        value = self.extra.get("signal")
        return value if isinstance(value, int) else None


class TooManyCommands(HostError):
    """The scope already runs as many commands as it may; nothing was started."""

    code = "too_many_commands"
    status = 429

    @property
    def running(self) -> int:
        """How many commands of the scope are running."""
        value = self.extra.get("running")
        return value if isinstance(value, int) else 0


class TooManyTransfers(HostError):
    """As many files are sent into and out of the sandbox as may be; nothing was changed."""

    code = "too_many_transfers"
    status = 429


class BuildFailed(HostError):
    """A build ended without an image; ``reason`` is the build's failure code."""

    code = "build_failed"
    status = 409


class HostFull(HostError):
    """The host has no capacity for one more container; nothing was created; retrying is safe."""

    code = "fleet_full_retry"
    status = 503


class HostUnavailable(HostError):
    """The agent does not respond, or the machine lacks something the runtime needs."""

    code = "host_unavailable"
    status = 503


class Held(HostUnavailable):
    """The container is frozen until the machine has free space again; none of it is lost."""

    code = "held"


class HostFault(HostError):
    """A bug in this package or a broken machine; the agent's log has the details."""

    code = "internal"
    status = 500


_RESERVED_FIELDS = frozenset({"code", "detail", "message"})
_BY_STATUS: Mapping[int, type[HostError]] = {
    400: InvalidRequest,
    404: NotFound,
    408: ExecTimeout,
    409: Conflict,
    413: FileTooLarge,
    422: InvalidRequest,
    429: TooManyCommands,
    503: HostUnavailable,
}


def _by_code() -> dict[str, type[HostError]]:
    # An inherited code says nothing about the subclass, which may not even accept a detail.
    return {cls.code: cls for cls in _subclasses(HostError) if "code" in vars(cls)}


def _subclasses(cls: type[HostError]) -> Iterator[type[HostError]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
