"""One process of a small job, for tests that start several: counts steps in a sharded array until something happens.

python tests/distributed_worker.py MODEL_DIR --coordinator_address=... --process_count=... --process_index=... [options]
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.experimental.multihost_utils
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from palmjax import checkpoint, distributed, guard, model_dir
from palmjax.cli import run_main
from palmjax.config import ConfigError, SaveCheckpointConfig
from palmjax.data.vocabulary import Bytes
from palmjax.provenance import DataPosition, RunInfo
from palmjax.state import TrainState

SPECS = {"w": P("data", None), "v": P(None, "data"), "replicated": P(None)}


def make_state(mesh: jax.sharding.Mesh) -> TrainState:
    """Values that depend on position only, so that any number of processes makes the same state."""

    def array(spec: P, shape: tuple[int, ...], dtype: type, offset: float) -> jax.Array:
        whole = (np.arange(np.prod(shape), dtype=np.float64).reshape(shape) * 0.37 + offset).astype(dtype)
        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), lambda index: whole[index])

    params = {name: array(spec, (8, 16)[: 1 + (name != "replicated")], np.float32, 1) for name, spec in SPECS.items()}
    return TrainState(
        step=array(P(), (), np.int32, 0),
        params=params,
        opt_state=({"m": array(P("data", None), (8, 16), np.float32, 2)},),
        rng=array(P(None), (2,), np.uint32, 3),
    )


def run_info(mesh: jax.sharding.Mesh) -> RunInfo:
    return RunInfo(
        seed=0,
        data=DataPosition(first_row=0),
        config="",
        flat_config={},
        vocabulary=Bytes(),
        mesh=dict(mesh.shape),
        code={},
        libraries={},
    )


@jax.jit
def advance(state: TrainState) -> TrainState:
    """A step with an all-reduce, so that no process can run ahead of the others."""
    total = jnp.einsum("ab->", state.params["w"], out_sharding=P())
    params = {**state.params, "replicated": state.params["replicated"] + 0 * total}
    return state.replace(step=state.step + 1, params=params)


def work(options: argparse.Namespace) -> int:
    mine = jax.process_index()
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Explicit,))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(mesh))
    with model_dir.lock(options.model_dir), guard.Preemption() as preemption, jax.set_mesh(mesh):
        saver = checkpoint.Checkpointer(options.model_dir, SaveCheckpointConfig(period=options.period, keep=2))
        begin = checkpoint.start(options.model_dir, None, like, lambda: make_state(mesh), Bytes())
        state, first = begin.state, int(begin.state.step)
        want = make_state(mesh)
        for name in SPECS:
            for here, there in zip(
                state.params[name].addressable_shards, want.params[name].addressable_shards, strict=True
            ):
                assert np.asarray(here.data).tobytes() == np.asarray(there.data).tobytes(), name
        print(f"from {begin.origin} step {first}", flush=True)
        for step in range(first + 1, options.steps + 1):
            state = advance(state)
            state.step.block_until_ready()
            stop = preemption.reached(step)
            if saver.should_save(step) or stop:
                saver.save(step, state, run_info(mesh))
            saver.check()
            if stop:
                saver.close()
                print(f"preempted at {step}", flush=True)
                return guard.EXIT_PREEMPTED
            if mine == options.victim and step == options.at:
                saver.wait()
                time.sleep(0.5)  # the others' part of the save ends, and their next step notices
            if mine == options.victim and step == options.at + 2:
                act(options.event)
            time.sleep(options.pause)
        saver.close()
    print(f"done at {options.steps}", flush=True)
    return 0


def agree(options: argparse.Namespace) -> int:
    """What all processes mean alike passes; in `data` the victim means something else."""
    distributed.agree("code", "a digest of any length" * 100)
    print("agreed on code", flush=True)
    distributed.agree("data", "b" if jax.process_index() == options.victim else "a")
    print("agreed on data", flush=True)
    jax.experimental.multihost_utils.sync_global_devices("the end")
    return 0


def act(event: str) -> None:
    print(f"{event} now", flush=True)
    match event:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        case "config-error":
            raise ConfigError("the file x.gin has no key Y")
        case "full-disk":  # also for what it says
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
        case "bug":
            raise KeyError("a bug of ours")


def main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--period", type=int, default=10)
    parser.add_argument("--pause", type=float, default=0.01)
    parser.add_argument("--event", default="")
    parser.add_argument("--victim", type=int, default=0)
    parser.add_argument("--at", type=int, default=15)
    parser.add_argument("--heartbeat", type=int, default=distributed.HEARTBEAT_SECONDS)
    distributed.add_flags(parser)
    options = parser.parse_args(argv)
    distributed.HEARTBEAT_SECONDS = options.heartbeat
    with distributed.session(options):
        if options.event == "agree":
            return agree(options)
        return work(options)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
