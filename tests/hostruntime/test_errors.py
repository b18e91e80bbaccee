"""The host's errors: what crosses the socket comes out as what went in."""

from __future__ import annotations

from hostruntime.errors import CwdNotFound, HostError, HostFault, HostFull, NotFound
from hostruntime.image import trees


def test_an_error_survives_the_wire() -> None:
    for error in (CwdNotFound("no /x", path="/x"), HostFull("full"), NotFound("gone")):
        again = HostError.from_wire(error.to_wire(), error.status)
        assert (type(again), again.detail, again.extra) == (type(error), error.detail, error.extra)


def test_a_fault_is_a_fault_whatever_subclasses_there_are() -> None:
    deep = trees.TreeTooDeep()
    for error in (HostFault("it broke"), deep):
        again = HostError.from_wire(error.to_wire(), error.status)
        assert (type(again), again.detail) == (HostFault, error.detail)


def test_an_unknown_code_is_read_by_its_status() -> None:
    again = HostError.from_wire({"code": "new", "detail": "x"}, 404)
    assert isinstance(again, NotFound)
    assert again.extra["host_code"] == "new"
