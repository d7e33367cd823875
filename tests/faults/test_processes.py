"""Two processes rewind together, one of them killed amid it, and stop together when the cloud tells one of them to."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from launch.local import free_port
from palmjax import guard, model_dir
from palmjax.checkpoint import inspect
from tests.e2e import jobs
from tests.faults import runs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google's metadata server, as far as it is asked."""

    values: ClassVar[dict[str, str]] = {"maintenance-event": "NONE", "preempted": "FALSE"}

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.values[self.path.rsplit("/", 1)[1]].encode())

    def log_message(self, *_: object) -> None: ...


def start(job: jobs.Job, folder: Path, instant: str, metadata: str = "") -> list[subprocess.Popen[str]]:
    """Two processes of one device, on poisoned data; see `poison`. metadata: the server that process 1 asks.

    They do not end by themselves: on a busy machine `runs.STEPS` may be done before it is heard that they have to go.
    """
    bindings = runs.bindings(job, folder, *runs.SPIKE, "TRAIN_STEPS=1000000")
    flags = [jobs.GIN, *(f"--gin.{binding}" for binding in bindings)]
    command = [sys.executable, "-m", "tests.faults.poison", *map(str, runs.POISON), instant, *flags]
    together = [f"--coordinator_address=localhost:{free_port()}", "--process_count=2"]
    return [
        subprocess.Popen(
            [*command, *together, f"--process_index={index}"],
            cwd=jobs.ROOT,
            env=jobs.environment() | ({"GCE_METADATA_HOST": metadata} if metadata and index == 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


def test_two_processes_rewind_alike_and_leave_together(job, finished, tmp_path):
    folder = tmp_path / "run"
    first, second = start(job, folder, "after the record")
    assert first.wait(300) == -9
    assert "was lost" in second.communicate(timeout=90)[0] and second.returncode != 0
    assert len(guard.read_rewinds(folder)) == 1 and max(model_dir.steps(folder)) > 40, "a void checkpoint is left"

    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        processes = start(job, folder, "never", f"localhost:{server.server_port}")
        jobs.wait_for_step(folder, 58, processes[0])
        Metadata.values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
        for process in processes:
            jobs.finish(process, code=guard.EXIT_PREEMPTED)
        server.shutdown()

    (here,), (there,) = guard.read_rewinds(folder), guard.read_rewinds(finished.defended)
    assert (here.step, here.to, here.skips) == (there.step, there.to, there.skips)
    losses, alone = runs.losses(folder), runs.losses(finished.defended)
    last = max(losses)
    assert sorted(losses) == list(range(1, last + 1)) and last >= 58, "preempted on its way"
    assert all(losses[step] == pytest.approx(alone[step], rel=1e-3) for step in losses.keys() & alone.keys())
    assert model_dir.newest(folder) == last and not inspect.verify(str(folder / f"checkpoint_{last}")).problems
    listed = json.loads((folder / f"checkpoint_{last}" / "checksums.json").read_text())["files"]
    assert {0, 1} <= {int(name.split("ocdbt.process_")[1][0]) for name in listed if "ocdbt.process_" in name}
