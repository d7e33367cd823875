"""How much more host memory a process takes while it saves, beside the state that it saves.

    python -m benchmarks.save_memory --megabytes 1024

One process on one CPU device saves a float32 state of the given size twice, from a loop that goes on and donates its
state, as training does. Printed: the resident memory before, its peak until the checkpoint is whole (sampled a hundred
times a second), and their difference as a multiple of the state's bytes, which on a host are the bytes of its shard.
The peer is Orbax's own `CheckpointManager` with its defaults, on the same state.

On CPU the device's memory is the host's, so the state itself is in "before" and a save's own share is what is added. On
an accelerator the copy to the host is that share.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class _Peak(threading.Thread):
    """Samples the resident memory until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._over = 0, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.01):
            self.peak = max(self.peak, _resident())

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.peak


def measure(kind: str, megabytes: int, arrays: int, host_bytes: int | None, folder: str) -> tuple[int, int, float]:
    """(bytes before, peak bytes, seconds until whole) of the second of two saves."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    from palmjax.checkpoint import Checkpointer
    from palmjax.config import SaveCheckpointConfig
    from palmjax.data.vocabulary import Bytes
    from palmjax.provenance import DataPosition, RunInfo
    from palmjax.state import TrainState

    elements = megabytes * (1 << 20) // 4 // arrays
    key = jax.random.key(0)
    make = jax.jit(lambda i: jax.random.normal(jax.random.fold_in(key, i), (elements // 1024, 1024)))
    params = {f"layer_{i}": make(i) for i in range(arrays)}
    state = TrainState(step=jnp.int32(0), params=params, opt_state=(), rng=jnp.zeros(2, jnp.uint32))
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    info = RunInfo(
        seed=0,
        data=DataPosition(first_row=0),
        config="",
        flat_config={},
        vocabulary=Bytes(),
        mesh={},
        code={},
        libraries={},
    )
    manager: Any = None
    saver: Any = None
    if kind == "orbax":
        manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=1))
    else:
        saver = Checkpointer(folder, SaveCheckpointConfig(keep=1, host_bytes=host_bytes))
    before = peak = 0
    seconds = 0.0
    for step in (1, 2):  # the first also pays for what is allocated once
        state = jax.block_until_ready(advance(state))
        time.sleep(0.5)
        before, sampler, began = _resident(), _Peak(), time.monotonic()
        sampler.start()
        if manager is not None:
            manager.save(step, args=ocp.args.StandardSave({"params": state.params, "step": state.step}))
        else:
            saver.save(step, state, info)
        state = jax.block_until_ready(advance(state))
        (manager.wait_until_finished if manager is not None else saver.wait)()
        seconds, peak = time.monotonic() - began, sampler.stop()
    return before, peak, seconds


def _child(kind: str, megabytes: int, arrays: int, host_bytes: int | None, folder: str, out: Any) -> None:
    out.put(measure(kind, megabytes, arrays, host_bytes, folder))


def in_a_process(kind: str, megabytes: int, arrays: int, host_bytes: int | None = None) -> tuple[int, int, float]:
    """`measure` in a process of its own: what another one has allocated before is in its way."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    with tempfile.TemporaryDirectory(prefix="save-") as folder:
        process = context.Process(target=_child, args=(kind, megabytes, arrays, host_bytes, folder, out))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)
        return out.get()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.save_memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--megabytes", type=int, default=1024, help="of the state (1024)")
    parser.add_argument("--arrays", type=int, default=16, help="that it consists of (16)")
    parser.add_argument("--host_megabytes", type=int, help="SaveCheckpointConfig.host_bytes (none)")
    options = parser.parse_args(argv)
    ratios = {}
    limit = None if options.host_megabytes is None else options.host_megabytes << 20
    for kind in ("palmjax", "orbax"):
        before, peak, seconds = in_a_process(kind, options.megabytes, options.arrays, limit)
        ratios[kind] = (peak - before) / (options.megabytes << 20)
        print(
            f"{kind:8} {before / 1e9:.2f} GB before, {peak / 1e9:.2f} GB at the peak: "
            f"{ratios[kind]:.2f} x the state while saving; whole after {seconds:.1f} s"
        )
    print(f"ratio to Orbax's defaults: {ratios['palmjax'] / max(ratios['orbax'], 1e-9):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
