"""Signals: counted once, summed over all, obeyed together; what was ignored stays ignored."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from megaspark.signals import AT_ONCE_S, Requests, Told

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def tell(number: int) -> None:
    signal.raise_signal(number)  # to this thread; os.kill may reach another one first, and the handler then runs some time later


def summed(*pending: list[float]) -> list[float]:
    return [sum(column) for column in zip(*pending, strict=True)]


def test_a_save_is_told_once_and_a_stop_for_ever() -> None:
    """A save repeated at every step from then on; a stop that is forgotten with the step in which it came."""
    said: list[str] = []
    requests = Requests(said.append)
    assert Requests.heard(requests.pending()) == Told()
    tell(signal.SIGUSR1)
    tell(signal.SIGUSR1)
    assert requests.pending() == [2, 0, 0] and requests.pending() == [0, 0, 0]
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        tell(number)
    assert requests.pending() == requests.pending() == [0, 3, 0]
    assert [text.split("(")[1] for text in said] == ["SIGUSR1)", "SIGUSR1)", "SIGTERM)", "SIGUSR2)", "SIGHUP)"]


def test_one_process_is_told_and_all_hear_it() -> None:
    """Rank 0 decides and the others train on: the next collective never ends."""
    quiet = [0.0, 0.0, 0.0]
    assert Requests.heard(summed(quiet, [1.0, 0.0, 0.0], quiet)) == Told(save=True)
    assert Requests.heard(summed(quiet, quiet, [0.0, 1.0, 0.0])) == Told(stop=True)
    assert Requests.heard(summed([0.0, 1.0, 0.0], [0.0, 0.0, 1.0])) == Told(stop=True, interrupted=True)
    assert (Told(stop=True).status, Told(stop=True, interrupted=True).status) == (0, 130)


def test_second_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches a worker by several ways within a moment: that is one; pressed again later it must help."""
    requests = Requests(lambda text: None)
    tell(signal.SIGINT)
    tell(signal.SIGINT)
    assert requests.pending() == [0, 0, 1]
    requests._interrupted_at -= 2 * AT_ONCE_S
    with pytest.raises(KeyboardInterrupt):
        tell(signal.SIGINT)


def test_ignored_signals_stay_ignored() -> None:
    """nohup ignores SIGHUP, a script's background job SIGINT: whoever asked for that must get it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    requests = Requests(lambda text: None)
    tell(signal.SIGHUP)
    assert requests.pending() == [0, 0, 0]
