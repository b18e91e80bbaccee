"""Which number an installation has on its machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostruntime.host.paths import StatePaths, claim_instance, release_instance


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
