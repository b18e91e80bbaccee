"""Whether a database and a state directory belong together, in every order of events."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostruntime.host.installation import InstallationMismatch, InstallationStore, StateUnclaimed
from hostruntime.host.paths import StatePaths
from hostruntime.wire.reconciliation import Claim


@pytest.fixture
def book(tmp_path: Path) -> InstallationStore:
    return InstallationStore(StatePaths(tmp_path))


def claim(epoch: int, *, of: str = "ours", fork: str = "") -> Claim:
    return Claim(of, epoch, f"{of}{epoch}{fork}", f"{of}{epoch - 1}")


def agree(book: InstallationStore, claim: Claim) -> None:
    book.agree(claim, empty=False, known=False)


def agreed_until(book: InstallationStore, epoch: int) -> None:
    book.agree(Claim("ours", 1, "ours1"), empty=True, known=False)
    for number in range(2, epoch + 1):
        agree(book, claim(number))


def test_they_go_on_together(book: InstallationStore) -> None:
    agreed_until(book, 5)
    book.require(claim(5))
    assert (book.read().epoch, book.read().mismatch) == (5, "")
    # The database did not hear of it, and says it again.
    agree(book, claim(5))
    with pytest.raises(InstallationMismatch):
        book.require(claim(4))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (claim(1, of="anothers"), "belongs to another installation"),
        (claim(3), "database is older"),
        (claim(40), "state directory is older"),
        # Restored from a backup of the last minute, and gone on: neither the mark nor the next.
        (claim(10, fork="'"), "each gone on"),
        (Claim("ours", 11, "ours11'", "ours10'"), "each gone on"),
    ],
)
def test_a_database_that_is_not_this_states_is_told_so(
    book: InstallationStore, asked: Claim, words: str
) -> None:
    agreed_until(book, 10)
    for _ in range(2):
        with pytest.raises(InstallationMismatch, match=words):
            agree(book, asked)
    with pytest.raises(InstallationMismatch, match=words):
        book.require(asked)
    # Not on the word of the right one's last mark either, before that one has said a new one.
    with pytest.raises(InstallationMismatch):
        book.require(claim(10))
    since = book.read().since
    assert since is not None
    agree(book, claim(11))
    assert book.read().mismatch == ""
    book.require(claim(11))


def test_a_state_that_nobody_has_claimed_is_not_anybodys(book: InstallationStore) -> None:
    with pytest.raises(StateUnclaimed):
        book.agree(claim(1), empty=False, known=False)
    assert book.read().mismatch == ""
    with pytest.raises(InstallationMismatch, match="knows none"):
        book.refuse(empty=False)
    assert "knows none" in book.read().mismatch
    # The right database is put in place.
    book.agree(claim(7), empty=False, known=True)
    book.require(claim(7))


def test_an_empty_state_beside_a_database_that_is_not_new_is_a_disk_that_is_not_mounted(
    book: InstallationStore,
) -> None:
    with pytest.raises(StateUnclaimed, match="mounted"):
        book.agree(claim(7), empty=True, known=False)
    with pytest.raises(InstallationMismatch, match="mounted"):
        book.refuse(empty=True)
    assert "mounted" in book.read().mismatch
    book.adopt(claim(8))
    book.require(claim(8))


def test_an_operators_word_counts(book: InstallationStore) -> None:
    agreed_until(book, 10)
    with pytest.raises(InstallationMismatch):
        agree(book, claim(3))
    book.adopt(claim(11))
    book.require(claim(11))
    agree(book, claim(12))
    # The one that was left is now the foreign one.
    with pytest.raises(InstallationMismatch, match="older"):
        agree(book, claim(4))


@pytest.mark.parametrize("text", ["", "{}x", '{"id": 3}', '{"id": "ours", "epoch": "1"}', "[]"])
def test_a_record_that_cannot_be_believed_agrees_with_nobody(
    book: InstallationStore, tmp_path: Path, text: str
) -> None:
    agreed_until(book, 3)
    (tmp_path / "installation.json").write_text(text)
    with pytest.raises(InstallationMismatch, match="damaged"):
        agree(book, claim(4))
    with pytest.raises(InstallationMismatch, match="damaged"):
        book.require(claim(3))
    book.adopt(claim(5))
    book.require(claim(5))
