"""Several processes, one job: start-up, and an end that says why when one of them is lost.

Flags are T5X's. A job of several processes lives and dies as one: when a process is lost, every other one stops within
a minute with a message and a non-zero exit code, and the restarted job goes on from the newest checkpoint. Four things
notice a loss. A collective fails (gloo on CPU): at once, in the main thread. A process that ends by an error leaves its
words and its exit code with JAX's coordinator, and the others end with the same. The coordinator's connection closes,
or a heartbeat is missed: JAX aborts the process from a thread of its own, and in jax 0.10.2 nothing in Python runs
before it does, so a small witness process says why.

jaxlib 0.10.2's coordinator measures heartbeats by the wall clock: where that jumps ahead by more than
`HEARTBEAT_SECONDS`, it takes every process for lost, and the job ends as above. Run again, it goes on to the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from palmjax.config import ConfigError
from palmjax.files import exit_code_of, in_words, say, say_error

EXIT_PEER_LOST = 69
"""Exit code of a process that stopped as another one was lost or never came (EX_UNAVAILABLE): run the job again."""

HEARTBEAT_SECONDS = 30
"""A silent process is taken for lost after this long. JAX's own 100 s would keep a pod waiting for nothing."""

LISTEN_SECONDS = 5.0
"""A process asks the coordinator this often whether another one has ended by an error."""

AUTO = "PALMJAX_DISTRIBUTED"
"""Set to `auto` by launchers on TPU pods and Slurm: addresses and ranks then come from the cluster's environment."""

_LOST = re.compile(
    r"Gloo .*failed|Connection (closed|reset) by peer|Socket closed|coordination.?service|heartbeat|Barrier failed",
    re.IGNORECASE,
)
"""What jaxlib 0.10.2 says when a peer or the coordinator is gone: gloo's and gRPC's own words.

A collective's failure comes as a JaxRuntimeError, or as a ValueError if the call itself waited for it.
"""


class NotJoined(ConfigError):
    """The processes of the job did not find each other: one of them, or what lies between, is not there yet."""

    exit_code = EXIT_PEER_LOST


def add_flags(parser: argparse.ArgumentParser) -> None:
    """T5X's flags for several processes. On one machine, `python -m launch.local` sets them."""
    group = parser.add_argument_group("several processes (T5X's flags)")
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--process_count", type=int, metavar="N", help="processes of the job")
    group.add_argument("--process_index", type=int, metavar="I", help="which of them this one is, from 0")
    group.add_argument("--initialization_timeout", type=int, default=300, metavar="SECONDS", help="wait for all (300)")
    group.add_argument(
        "--multiprocess_gpu", action="store_true", help="take what is not given from the cluster (Slurm, Open MPI, GKE)"
    )


def is_wanted(options: argparse.Namespace) -> bool:
    """Whether the flags or the environment describe a job of several processes.

    Raises ConfigError if the flags contradict each other.
    """
    address, count, index = options.coordinator_address, options.process_count, options.process_index
    if options.multiprocess_gpu or os.environ.get(AUTO) == "auto" or _is_tpu_pod():
        return True
    if (address, count, index) == (None, None, None):
        return False
    _check_flags(address, count, index)
    return True


def _join(options: argparse.Namespace) -> None:
    """Meets the other processes, before anything asks for devices. What is not given comes from the cluster."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if options.process_index == 0 and options.coordinator_address:
        _check_port(int(options.coordinator_address.rsplit(":", 1)[1]))
    try:
        jax.distributed.initialize(
            options.coordinator_address,
            options.process_count,
            options.process_index,
            initialization_timeout=options.initialization_timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        raise NotJoined(f"{_not_joined(options)} ({str(error).splitlines()[0][:160]})") from error
    except (RuntimeError, ValueError) as error:  # the cluster's environment does not say what JAX needs to know
        raise ConfigError(f"this process can't join the others: {str(error).splitlines()[0][:200]}") from error


def _check_port(port: int) -> None:
    """Process 0 will listen there on all addresses; jaxlib 0.10.2 crashes if it can't."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        # A port in use may be that of the attempt before, which is still ending.
        kind = NotJoined if error.errno == errno.EADDRINUSE else ConfigError
        raise kind(f"--coordinator_address: process 0 can't listen on port {port}: {error.strerror}") from error


def _not_joined(options: argparse.Namespace) -> str:
    index, count = options.process_index, options.process_count
    who = "this process" if index is None or count is None else f"process {index} of {count}"
    where = options.coordinator_address or "the address that the cluster gives"
    return f"{who} did not find the others at {where} within {options.initialization_timeout} s: do all of them run?"


def _check_flags(address: str | None, count: int | None, index: int | None) -> None:
    given = {"coordinator_address": address, "process_count": count, "process_index": index}
    if missing := [f"--{name}" for name, value in given.items() if value is None]:
        raise ConfigError(f"several processes need {' and '.join(missing)} too, or --multiprocess_gpu to detect it")
    assert address is not None and count is not None and index is not None
    if not 0 <= index < count:
        raise ConfigError(f"--process_index={index} is not one of --process_count={count} (from 0)")
    if not re.fullmatch(r".+:\d+", address):
        raise ConfigError(f"--coordinator_address={address} is not HOST:PORT")


def _is_tpu_pod() -> bool:
    """Whether GKE says that this host is one of several of a TPU slice."""
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def agree(what: str, digest: str) -> None:
    """Raises ConfigError on a process whose `digest` (any text that stands for `what`) is not that of process 0.

    All processes of a job call it, in the same order. Different programs would hang in their first collective, and
    different data would train without a word. One process has nobody to agree with.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    # Hashed: the collective needs one size everywhere, and calls in another order must differ too.
    mine = np.frombuffer(hashlib.sha256(f"{what}\0{digest}".encode()).digest(), np.uint8)
    if not np.array_equal(multihost_utils.broadcast_one_to_all(mine), mine):
        raise ConfigError(
            f"process {jax.process_index()} has other {what} than process 0: start all processes of a job "
            "with the same command, code and shared folders"
        )


def from_first(flag: bool) -> bool:
    """What process 0 says, on every process; all call it together."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))


def text_from_first(text: str) -> str:
    """Process 0's text, on every process; all call it together. What the others give is of no account.

    A file that people write while a job runs is read by one process alone: others might see another version of it.
    """
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(data), np.int32)))
    # The collective needs one size everywhere.
    mine = np.zeros(size, np.uint8)
    mine[: len(data)] = data[:size]
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(mine))).decode()


def meet(where: str) -> None:
    """Returns when all processes have called it with the same `where`."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def everywhere(problem: str) -> str:
    """The problem of the first process that has one, on every process; "" if none has. All call it together.

    What one process finds wrong, such as its part of a checkpoint, must lead all of them the same way.
    """
    if jax.process_count() == 1:
        return problem
    from jax.experimental import multihost_utils

    mine = np.zeros(512, np.uint8)
    text = problem.encode()[: len(mine)]
    mine[: len(text)] = np.frombuffer(text, np.uint8)
    found = multihost_utils.process_allgather(mine)
    texts = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in found]
    return next((text for text in texts if text), "")


# --- the end -------------------------------------------------------------------------------------------------------

_ending = threading.Event()
_resume_from = ""
_witness: _Witness | None = None


def remember(checkpoint: str) -> None:
    """Names the checkpoint from which a restarted job would go on, for the message if a process is lost."""
    global _resume_from
    _resume_from = checkpoint
    if _witness is not None:
        _witness.tell(_without_a_word())


def _advice() -> str:
    goes_on = f"; it goes on from {_resume_from}" if _resume_from else ""
    return f"Run the job again{goes_on}."


def _without_a_word() -> str:
    who = f"process {jax.process_index()} of {jax.process_count()} (pid {os.getpid()})"
    return f"{who} was killed, or stopped by JAX because another process was lost.\n{_advice()}"


def explain(error: BaseException) -> str | None:
    """One or two lines if `error` (or what it came from) means that another process was lost; None otherwise."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, jax.errors.JaxRuntimeError | TimeoutError | ValueError) and _LOST.search(str(seen)):
            mine, count = jax.process_index(), jax.process_count()
            who = f"process {1 - mine}" if count == 2 else "another process"
            cause = str(seen).splitlines()[0][:160]
            return f"process {mine} of {count} stops: {who} was lost ({cause}).\n{_advice()}"
        seen = seen.__cause__ or seen.__context__
    return None


@contextlib.contextmanager
def session(options: argparse.Namespace) -> Iterator[None]:
    """Joins the job, runs the block and leaves the job. Without flags for several processes it does nothing.

    An error in one of several processes ends that process here, after it is printed: a usual exit would wait for the
    others at JAX's shutdown barrier, while they wait for this one in a collective.
    """
    global _witness
    if not is_wanted(options):
        yield
        return
    _ending.clear()
    # Before joining: jax 0.10.2 aborts the process if the coordinator doesn't answer in time.
    _witness = _Witness(_not_joined(options))
    try:
        _join(options)
        _witness.tell(_without_a_word())
        listener = threading.Thread(target=_listen, args=(_witness,), name="palmjax-peers", daemon=True)
        listener.start()
        yield
    except BaseException as error:
        _ending.set()
        _exit(_report(error, _witness))
    _ending.set()
    listener.join()
    jax.distributed.shutdown()
    _witness.tell("")
    _witness = None


def _report(error: BaseException, witness: _Witness) -> int:
    """Says what ended this process and returns its exit code, as `cli.run_main` does for one process."""
    if text := explain(error):
        code, why = _told() or (EXIT_PEER_LOST, "")
        # Said after this process's end, so that JAX's own outcry, if it comes, comes before.
        witness.tell(f"process {jax.process_index()} of {jax.process_count()} stops, as {why}" if why else text)
        return code
    witness.tell("")
    # A client is there exactly if this process joined; before that, asking for the index would start a backend.
    joined = jax.distributed.is_initialized()
    prefix = f"process {jax.process_index()} of {jax.process_count()}: " if joined else ""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case KeyboardInterrupt():
            say(f"{prefix}interrupted")
            return 130
        case ConfigError():
            code = error.exit_code
        case OSError():
            code = exit_code_of(error)
        case _:
            say("".join(traceback.format_exception(error)))
            return 1
    say_error(error, prefix)
    if joined:
        _tell(code, in_words(error))
    return code


_ENDED = "palmjax/ended"
"""Where JAX's coordinator keeps what the first process to end by an error has said: its exit code and words."""


def _tell(code: int, text: str) -> None:
    """So that the others end for this reason and with this code, where they would only miss this process."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or the coordinator is gone
        _coordinator().key_value_set(_ENDED, f"{code} process {jax.process_index()} ended: {text}")


def _told() -> tuple[int, str] | None:
    """(exit code, why) of the first process that ended by an error; None if none has, or the coordinator is gone."""
    try:
        code, _, why = _coordinator().key_value_try_get(_ENDED).partition(" ")
    except jax.errors.JaxRuntimeError:
        return None
    return int(code), why


def _listen(witness: _Witness) -> None:
    """In a thread: ends this process when another one has ended by an error. Its collectives may go on waiting, and
    JAX's coordinator tells of the loss after `HEARTBEAT_SECONDS` only.
    """
    while not _ending.wait(LISTEN_SECONDS):
        # The one that told may still be ending, and if this is the coordinator, JAX aborts whoever outlives it.
        if (told := _told()) is not None and not _ending.wait(1.0):
            code, why = told
            witness.tell("")
            say(f"error: process {jax.process_index()} of {jax.process_count()} stops, as {why}")
            _exit(code)


def _coordinator() -> Any:
    from jax._src import distributed  # jax 0.10.2 has no public way to its key-value store

    return distributed.global_state.client


def leave(code: int) -> None:
    """Ends this process at once, from any thread; the caller has said why."""
    if _witness is not None:
        _witness.tell("")
    _exit(code)


def _exit(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


class _Witness:
    """A small process that outlives this one and then says the last text it was told, if any, on stderr.

    It waits on a pipe, whose end is this process's end, however that comes: an exit, an abort, SIGKILL.
    """

    # `python -I -S`: 15 ms to start, and nothing of jax in it. Signals to the whole group are meant for the others.
    PROGRAM = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
last = ""
for line in sys.stdin:
    last = line.strip()
if last:
    os.write(2, ("error: " + last.replace("\\t", "\\n") + "\\n").encode())
"""

    def __init__(self, text: str):
        command = [sys.executable, "-I", "-S", "-c", self.PROGRAM]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self.tell(text)

    def tell(self, text: str) -> None:
        """What to say from now on; nothing if empty."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a witness that is gone is no reason to stop
            self._process.stdin.write(text.replace("\n", "\t") + "\n")
            self._process.stdin.flush()
