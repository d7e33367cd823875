"""`palmjax train` whose data stop coming at a step, as from a file system that no longer answers.

python tests/faults/hang.py STEP PROCESS train FILE.gin [...]: in process PROCESS the batch behind STEP never comes.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax

from palmjax import cli
from palmjax.data import feed


class Stalled(feed.Feed):
    """A feed that waits for ever behind its STEP-th batch."""

    limit, process = int(sys.argv[1]), int(sys.argv[2])
    given = 0

    def __next__(self):
        if self.given == self.limit and jax.process_index() == self.process:
            threading.Event().wait()
        self.given += 1
        return super().__next__()


feed.Feed = Stalled
sys.exit(cli.main(sys.argv[3:]))
