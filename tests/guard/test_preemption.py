"""SIGTERM in one process: a flag, not an end; handlers are put back. Several processes: test_distributed.py."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from palmjax import guard
from palmjax.guard import notice

ROOT = Path(__file__).parents[2]


def test_sigterm_is_noticed_and_the_handler_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with guard.Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(2) and preemption.reached(3)
        assert signal.getsignal(signal.SIGTERM) == before, "a second SIGTERM must end the process"
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_handler_is_put_back_after_an_error_too() -> None:
    def mine(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with guard.Preemption():
            assert signal.getsignal(signal.SIGTERM) != mine
            raise KeyError
    except KeyError:
        assert signal.getsignal(signal.SIGTERM) == mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_sigterm_ends_the_process() -> None:
    code = (
        "import time\nfrom palmjax import guard\n"
        "with guard.Preemption() as p:\n"
        "    print('ready', flush=True)\n"
        "    while not p.reached(0): time.sleep(0.01)\n"
        "    print('noticed', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "noticed\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM


def test_asking_costs_nothing() -> None:
    with guard.Preemption() as preemption:
        begun = time.perf_counter()
        for step in range(1000):
            preemption.reached(step)
        assert time.perf_counter() - begun < 0.1


# --- the cloud's notice ----------------------------------------------------------------------------------------------


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google's metadata server, as far as it is asked: two keys, and a header that it insists on."""

    values: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:
        key = self.path.removeprefix("/computeMetadata/v1/instance/")
        known = self.headers["Metadata-Flavor"] == "Google" and key in self.values
        self.send_response(200 if known else 403)
        self.end_headers()
        self.wfile.write(self.values[key].encode() if known else b"")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What the server that a process here asks will say."""
    values = {"maintenance-event": "NONE", "preempted": "FALSE"}
    monkeypatch.setattr(Metadata, "values", values)
    monkeypatch.setattr(notice, "PERIOD_SECONDS", 0.01)
    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
        monkeypatch.setenv("http_proxy", "http://localhost:9")  # which must not be asked
        yield values
        server.shutdown()


def within(seconds: float, what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.005)
    return what()


@pytest.mark.parametrize(
    ("key", "value"), [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")]
)
def test_what_the_cloud_announces_is_noticed(metadata: dict[str, str], key: str, value: str) -> None:
    with guard.Preemption() as preemption:
        metadata["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"  # nothing is lost by that
        assert not within(0.2, lambda: preemption.reached(1))
        metadata[key] = value
        assert within(10, lambda: preemption.reached(2)) and preemption.why == f"the cloud says {key} {value}"


def test_a_run_that_begins_under_an_announcement_goes_on_until_the_next(
    metadata: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Or a job that is started again on the same machine would leave again and again."""
    metadata["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    said: list[str] = []
    with guard.Preemption() as preemption:
        assert within(10, lambda: bool(said.append(capsys.readouterr().err) or "as this run begins" in "".join(said)))
        assert not within(0.2, lambda: preemption.reached(1))
        metadata["maintenance-event"] = "NONE"
        time.sleep(0.2)
        metadata["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
        assert within(10, lambda: preemption.reached(2))


def test_a_server_that_does_not_answer_is_told_once_and_ends_nothing(
    metadata: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    del metadata["preempted"]
    with guard.Preemption() as preemption:
        assert not within(0.2, lambda: preemption.reached(1))
    assert capsys.readouterr().err.count("does not answer") == 1


def test_nobody_is_asked_on_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    for product, host in (("Google Compute Engine", "metadata.google.internal"), ("a laptop", None)):
        (tmp_path / "product").write_text(f"{product}\n")
        monkeypatch.setattr(notice, "PRODUCT", tmp_path / "product")
        assert notice.server() == host
    monkeypatch.setattr(notice, "PRODUCT", tmp_path / "none")
    assert notice.server() is None
