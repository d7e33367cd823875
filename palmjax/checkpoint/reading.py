"""Reading a checkpoint: refused by name if it is another model's, and compared with its checksums if it is not."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from palmjax import distributed
from palmjax.checkpoint import digest, seal
from palmjax.checkpoint import tree as trees
from palmjax.checkpoint.seal import Damaged
from palmjax.config import ConfigError
from palmjax.data.vocabulary import Vocabulary
from palmjax.model_dir import Unreadable, as_path, inventory, resolve
from palmjax.provenance import RunInfo
from palmjax.state import TrainState

_STORAGE_FAILED = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|UNAUTHENTICATED|PERMISSION_DENIED"
    r"|Input/output error|Stale file handle|Connection (?:timed out|refused|reset)|Permission denied"
)
"""What TensorStore 0.1.80 says when a storage does not answer, which is no word against what lies there."""


def read_info(path: str | os.PathLike[str]) -> RunInfo:
    """What a checkpoint says of its run. `path` as in `resolve`. Raises ConfigError if it can't be read: Damaged if
    that is because it is not what was written, Unreadable if the storage fails.
    """
    folder = as_path(resolve(path))
    try:
        info = RunInfo.from_json(seal.read_file(folder, "info/metadata").decode())
    except Unreadable:
        raise
    except Damaged as error:
        raise Damaged(f"{error}; {inventory(folder.parent)}") from error
    except ConfigError as error:  # of a newer palmjax, or on a vocabulary that this one can't read
        raise ConfigError(f"{folder}/info can't be read: {error}; {inventory(folder.parent)}") from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise Damaged(f"{folder}/info can't be read: {reason}; {inventory(folder.parent)}") from error
    if info.sealed and not (folder / seal.FILE).exists():
        raise Damaged(f"{folder} is damaged: {seal.FILE} is missing; {inventory(folder.parent)}")
    return info


def check_vocabulary(path: str, info: RunInfo, vocabulary: Vocabulary) -> None:
    """Raises ConfigError, naming both, unless the checkpoint was trained on this vocabulary."""
    if info.vocabulary.fingerprint != vocabulary.fingerprint:
        raise ConfigError(
            f"{path} was trained on another vocabulary: {_vocabulary_text(info.vocabulary)} there, "
            f"{_vocabulary_text(vocabulary)} here"
        )


def _vocabulary_text(vocabulary: Vocabulary) -> str:
    return f"{vocabulary.to_json()['kind']} of {vocabulary.size} ids (fingerprint {vocabulary.fingerprint})"


def restore_state(path: str | os.PathLike[str], abstract_state: TrainState) -> TrainState:
    """The whole state, bit for bit, laid out as `abstract_state` says. All processes of a job call it together.

    abstract_state: ShapeDtypeStructs with shardings on the present mesh, which need not be the one that saved; nor need
    the number of processes. Before an array is read, every byte of the folder is compared with the checksum of its
    file; behind it, every array with its digest. Raises ConfigError if the checkpoint is of another model or optimizer,
    Damaged if it is not what was saved, Unreadable if the storage fails; the last two on all processes if on one.
    """
    folder = resolve(path)
    info = read_info(folder)
    trees.check_arrays(folder, info.arrays, trees.describe(abstract_state))
    _check(folder, whole=True, share=(jax.process_index(), jax.process_count()))
    return _read(folder, info, abstract_state)


def restore_params(path: str | os.PathLike[str], abstract_params: Any) -> Any:
    """The parameters alone: the optimizer's arrays are not read. Arguments and errors as `restore_state`.

    Files of arrays are not read to the last byte for this: what is read of them is compared with its digests.
    """
    folder, wanted = resolve(path), {"params": abstract_params}
    info = read_info(folder)
    saved = {n: a for n, a in info.arrays.items() if n.startswith("params/")}
    trees.check_arrays(folder, saved, trees.describe(wanted))
    _check(folder, whole=False)
    return _read(folder, info, wanted)["params"]


def _check(folder: str, *, whole: bool, share: tuple[int, int] = (0, 1)) -> None:
    """Compares the files with their checksums, all processes together: what one of them finds, all raise."""
    with together():
        _raise_if(folder, _first(seal.check(as_path(folder), whole=whole, share=share)))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what every process of a job reads by itself: if one of them finds damage, or can't read, all raise it.

    Where one can't read and another finds damage, nothing counts as damaged.
    """
    problem: Damaged | Unreadable | None = None
    try:
        yield
    except (Damaged, Unreadable) as error:
        problem = error
    for kind in (Unreadable, Damaged):
        if text := distributed.everywhere(str(problem) if isinstance(problem, kind) else ""):
            raise kind(text) from problem


def _first(problems: Iterable[str]) -> str:
    return next(iter(problems), "")


def _raise_if(folder: str, problem: str, cause: BaseException | None = None) -> None:
    if problem:
        raise Damaged(f"{folder} is damaged: {problem}; {inventory(as_path(folder).parent)}") from cause


def _read(folder: str, info: RunInfo, abstract: Any) -> Any:
    import orbax.checkpoint as ocp

    def how(leaf: jax.ShapeDtypeStruct) -> Any:
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    item = trees.nested(abstract)
    args = ocp.args.PyTreeRestore(item=item, restore_args=jax.tree.map(how, item), partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = trees.like(abstract, reader.restore(as_path(folder) / "state", args=args))
        # With partial_restore Orbax 0.12.8 gives back what it was asked for in place of an array that it doesn't find.
        if lost := [n for n, leaf in trees.leaves(tree) if not isinstance(leaf, jax.Array)]:
            raise ValueError(f"{'/'.join(lost[0])} is not in state/")
    except (jax.errors.JaxRuntimeError, MemoryError):  # or a lost process: nothing that the files could help
        raise
    except Exception as error:  # a damaged file can meet any check or none inside Orbax, its assertions included
        if _STORAGE_FAILED.search(str(error)):
            raise Unreadable(f"{folder} can't be read now: {str(error).splitlines()[0][:200]}") from error
        _raise_if(folder, (str(error) or type(error).__name__).splitlines()[0][:200], error)
        raise
    _raise_if(
        folder, _first(f"{name} has not the values that were saved" for name in digest.differing(info.digests, tree))
    )
    return tree
