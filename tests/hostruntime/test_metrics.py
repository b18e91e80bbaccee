"""The minute of samples that the agent keeps of each sandbox."""

from __future__ import annotations

from hostruntime.sandbox.metrics import Windows


def test_a_window_holds_a_minute_and_no_more() -> None:
    windows = Windows()
    for number in range(1000):
        windows.add("one", 2.0 * number, 2.0, 1.0, number)
    found = windows.of("one")
    assert 60.0 <= found[-1].at - found[0].at <= 62.0
    assert {sample.cpu_cores for sample in found} == {0.5}
    assert found[-1].memory_bytes == 999


def test_what_is_no_sample_of_a_moment_is_left_out() -> None:
    windows = Windows()
    # Just before a stop; and after a restart of the agent, which read nothing meanwhile.
    windows.add("one", 1.0, 0.01, 0.01, 1)
    windows.add("one", 900.0, 600.0, 30.0, 1)
    assert windows.of("one") == ()
    # Counters of another group by the same name begin anew.
    windows.add("one", 902.0, 2.0, -5.0, 1)
    assert [sample.cpu_cores for sample in windows.of("one")] == [0.0]


def test_nothing_is_kept_of_one_that_ended() -> None:
    windows = Windows()
    windows.add("one", 2.0, 2.0, 1.0, 1)
    windows.forget("one")
    windows.forget("two")
    assert windows.of("one") == ()
