"""The uploading thread: when it uploads, how it tries again, what it says, and how long it holds up the end."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from palmjax.metrics.uploader import Pace, Uploader

WaitUntil = Callable[[Callable[[], bool]], None]
NEVER = 1e6


class Uploads:
    """A source of so many writes; it fails while `down` holds a reason, and each write waits while `gate` is shut."""

    def __init__(self, period: float = NEVER, writes: int = 1):
        self.period, self.writes, self.written = period, writes, 0
        self.times: list[float] = []
        self.down: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def upload(self) -> Iterator[None]:
        self.times.append(time.monotonic())
        for _ in range(self.writes):
            self.gate.wait(60)
            if self.down is not None:
                raise self.down
            self.written += 1
            yield

    def gaps(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.times)]


class Reports(list):
    """What was said."""

    def __call__(self, text: str) -> None:
        self.append(text)


def start(*sources: Uploads, report: Callable[[str], None] = pytest.fail, **pace: float) -> Uploader:
    given = {"spacing": 0.01, "retry": 0.02, "longest_retry": 0.02, **pace}
    return Uploader(sources, "gs://bucket/run", report, Pace(**given))  # pyright: ignore[reportArgumentType]


def test_each_source_has_its_own_period_and_all_are_uploaded_at_the_close(wait_until: WaitUntil) -> None:
    often, rare = Uploads(0.05), Uploads()
    began = time.monotonic()
    uploader = start(often, rare)
    wait_until(lambda: len(often.times) >= 4)
    assert rare.times == []
    assert all(when - began >= 0.05 * n for n, when in enumerate(often.times, 1))
    assert uploader.close()
    assert len(rare.times) == 1


def test_asking_uploads_at_once_and_many_times_asked_is_not_many_uploads(wait_until: WaitUntil) -> None:
    source, other = Uploads(), Uploads()
    uploader = start(source, other, spacing=0.2)
    began = time.monotonic()
    asked = 0
    while time.monotonic() < began + 0.5:
        uploader.ask(source)
        asked += 1
    wait_until(lambda: len(source.times) >= 3)
    assert asked > 100 and min(source.gaps()) >= 0.2 and other.times == []
    assert uploader.close()
    assert min(source.gaps()) >= 0.2, "the close wrote an object twice within the spacing"


def test_a_failure_is_tried_again_ever_slower_and_reported_once(wait_until: WaitUntil) -> None:
    source, reports = Uploads(), Reports()
    source.down = ConnectionError("no route\nto host")
    uploader = start(source, report=reports, retry=0.05, longest_retry=0.2)
    while len(source.times) < 6:
        uploader.ask(source)  # being asked in between does not make it try sooner
        time.sleep(0.001)
    for gap, least in zip(source.gaps(), (0.05, 0.1, 0.2, 0.2, 0.2), strict=False):
        assert gap >= least
    assert reports == [
        "metrics don't reach gs://bucket/run: ConnectionError: no route to host; the run goes on, and they are sent "
        "again"
    ]
    source.down = None
    assert uploader.close() and len(reports) == 1


def test_a_second_outage_is_reported_too_and_waits_no_longer_than_the_first(wait_until: WaitUntil) -> None:
    source, reports = Uploads(0.01), Reports()
    uploader = start(source, report=reports, retry=0.02, longest_retry=NEVER)
    for outage in (1, 2):
        source.down = ConnectionError(f"outage {outage}")
        wait_until(lambda outage=outage: len(reports) == outage)
        source.down = None
        tried = len(source.times)
        wait_until(lambda tried=tried: len(source.times) >= tried + 2)
    assert [f"outage {n}" in text for n, text in enumerate(reports, 1)] == [True, True]
    assert uploader.close()


def test_a_source_that_fails_does_not_hold_up_another(wait_until: WaitUntil) -> None:
    broken, whole, reports = Uploads(), Uploads(), Reports()
    broken.down = PermissionError("storage.objects.create")
    uploader = start(broken, whole, report=reports, close=0.2)
    uploader.ask(broken)
    uploader.ask(whole)
    wait_until(lambda: len(whole.times) == 1 and len(broken.times) >= 2)
    assert not uploader.close() and len(reports) == 1


def test_nobody_waits_for_an_upload_that_hangs_but_the_close_and_that_not_for_long(wait_until: WaitUntil) -> None:
    source = Uploads()
    source.gate.clear()
    uploader = start(source, close=0.3)
    uploader.ask(source)
    wait_until(lambda: len(source.times) == 1)
    began = time.monotonic()
    uploader.ask(source)
    assert time.monotonic() - began < 0.2
    assert not uploader.close()
    assert 0.3 <= time.monotonic() - began < 5
    source.gate.set()


def test_no_write_begins_once_the_time_to_close_is_over(wait_until: WaitUntil) -> None:
    """A write that hangs is left behind; when it returns after all, the thread does nothing more."""
    source = Uploads(writes=3)
    source.gate.clear()
    uploader = start(source, close=0.2)
    assert not uploader.close()
    source.gate.set()
    wait_until(lambda: not uploader._thread.is_alive())
    assert source.written == 1


def test_a_close_that_can_only_fail_is_over_in_time_and_leaves_no_thread() -> None:
    source, reports = Uploads(), Reports()
    source.down = ConnectionError("down")
    uploader = start(source, report=reports, retry=0.3, longest_retry=NEVER, close=0.5)
    began = time.monotonic()
    assert not uploader.close() and time.monotonic() - began < 5
    assert len(source.times) == 2 and not uploader._thread.is_alive()  # at 0 and 0.3; the next would be at 0.9


def test_the_close_cuts_a_long_wait_short(wait_until: WaitUntil) -> None:
    source, reports = Uploads(), Reports()
    source.down = ConnectionError("down")
    uploader = start(source, report=reports, retry=NEVER, longest_retry=NEVER)
    uploader.ask(source)
    wait_until(lambda: len(reports) == 1)
    source.down = None
    began = time.monotonic()
    assert uploader.close() and time.monotonic() - began < 5


def test_the_close_tries_again_while_it_has_time() -> None:
    source, reports = Uploads(), Reports()
    source.down = ConnectionError("down")
    uploader = start(source, report=reports, close=30.0)
    threading.Timer(0.3, lambda: setattr(source, "down", None)).start()
    assert uploader.close() and len(source.times) >= 3 and len(reports) == 1


def test_a_console_that_is_gone_does_not_end_the_uploads(wait_until: WaitUntil) -> None:
    def broken(text: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    source = Uploads()
    source.down = ConnectionError("down")
    uploader = start(source, report=broken)
    uploader.ask(source)
    wait_until(lambda: len(source.times) >= 2)
    source.down = None
    assert uploader.close()
