"""The cloud's word that this virtual machine will be taken away, from its metadata server.

Google Compute Engine announces host maintenance (TPU and GPU machines are terminated, not moved) and the preemption of
a spot machine there, some time before anything sends SIGTERM; a process that was started over ssh may get no SIGTERM at
all. A thread asks every few seconds. What is announced already when a run begins is told and not acted upon: a
restarted run would else leave again at once, for as long as the announcement stands.
"""

from __future__ import annotations

import contextlib
import os
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

METADATA_HOST = "GCE_METADATA_HOST"
"""Environment variable that names another metadata server (HOST or HOST:PORT), as in Google's own client libraries."""

SERVER = "metadata.google.internal"
PRODUCT = Path("/sys/class/dmi/id/product_name")
"""What the firmware says of the machine: on Google's, also inside a container, a name that begins with Google."""

WORDS = {"maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE",), "preempted": ("TRUE",)}
"""Keys below `instance/`, and the values at which the machine will be taken away."""

PERIOD_SECONDS = 2.0
TIMEOUT_SECONDS = 5.0


def server() -> str | None:
    """The metadata server to ask, HOST[:PORT]; None where there is none. Reads one local file and asks nobody."""
    if given := os.environ.get(METADATA_HOST):
        return given
    with contextlib.suppress(OSError):
        if PRODUCT.read_text().startswith("Google"):
            return SERVER
    return None


class Notice:
    """Watches the metadata server in a thread until `close`. act: called once, with the announcement in words; tell:
    with what is no reason to leave.
    """

    def __init__(self, host: str, act: Callable[[str], None], tell: Callable[[str], None]):
        self._host, self._act, self._tell = host, act, tell
        # The server is this machine's own: a proxy could not reach it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="palmjax-notice", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Does not wait for a request under way."""
        self._closed.set()

    def announced(self) -> str:
        """What stands on the server, "" if nothing does. Raises OSError if it does not answer."""
        for key, values in WORDS.items():
            url = f"http://{self._host}/computeMetadata/v1/instance/{key}"
            request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
                value = answer.read(1000).decode(errors="replace").strip()
            if value in values:
                return f"the cloud says {key} {value}"
        return ""

    def _watch(self) -> None:
        known: str | None = None  # what stood there when it was last asked
        silent = False
        while True:
            try:
                said = self.announced()
            except OSError as error:
                if not silent:
                    self._tell(f"{self._host} does not answer ({error}): maintenance is not noticed until it does")
                silent = True
            else:
                silent = False
                if said and known is None:
                    self._tell(f"{said} already as this run begins: it goes on")
                elif said and said != known:
                    self._act(said)
                    return
                known = said
            if self._closed.wait(PERIOD_SECONDS):
                return
