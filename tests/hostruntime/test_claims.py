"""Which number an installation has on its machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostruntime.errors import HostUnavailable
from hostruntime.host.ids import ID_BASE, ID_COUNT, IDS_PER_SLOT, MAX_INSTANCES, MAX_SLOTS
from hostruntime.host.paths import Instance, StatePaths, claim_instance, release_instance


@pytest.mark.parametrize("record", ["{}", "", "[", '{"index": "1"}', '{"index": 99}', "\x00\xff"])
def test_a_bad_record_does_not_change_the_number(tmp_path: Path, record: str) -> None:
    """What runs is named after it: with another number it would be nobody's."""
    claims = tmp_path / "claims"
    first, second = (StatePaths(tmp_path / name).ensure() for name in ("one", "two"))
    claim_instance(first, claims)
    own = claim_instance(second, claims)
    release_instance(first, claims)
    second.instance_file.write_text(record)
    assert claim_instance(second, claims) == own
    assert claim_instance(second, claims) == own


@pytest.mark.parametrize("claim", ["", "\x00", "no path", "/\x00"])
def test_a_bad_claim_is_nobodys(tmp_path: Path, claim: str) -> None:
    claims, paths = tmp_path / "claims", StatePaths(tmp_path / "one").ensure()
    claims.mkdir()
    free = claim_instance(paths, tmp_path / "others").index
    (claims / str(free)).write_text(claim)
    (claims / str(free + 1)).mkdir()
    assert claim_instance(paths, claims).index == free


def test_a_number_of_an_earlier_version_is_not_given_up_silently(tmp_path: Path) -> None:
    """There were sixteen: what runs under one of the others would be found by nobody."""
    claims, paths = tmp_path / "claims", StatePaths(tmp_path / "one").ensure()
    claims.mkdir()
    paths.instance_file.write_text('{"index": 12}')
    (claims / "12").write_text(f"{paths.root}\n")
    with pytest.raises(HostUnavailable, match=r"instance 12.*make down"):
        claim_instance(paths, claims)
    # As after a reboot, which no container survives.
    (claims / "12").unlink()
    assert claim_instance(paths, claims).index < MAX_INSTANCES


def test_every_slot_has_ids_of_its_own_below_the_shared_ones() -> None:
    assert Instance(1).slot_id_base(0) == Instance(0).slot_id_base(MAX_SLOTS - 1) + IDS_PER_SLOT
    last = Instance(MAX_INSTANCES - 1).slot_id_base(MAX_SLOTS - 1)
    assert Instance(0).slot_id_base(0) == ID_BASE
    assert last + IDS_PER_SLOT == ID_BASE + ID_COUNT
