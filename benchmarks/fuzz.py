"""Seeded mutations of gin files, token stores and checkpoint metadata: a clear error or the right result, never else.

    python -m benchmarks.fuzz --count 1000 --seed 0

Each campaign changes one file at a time and opens it as a run would. Allowed are a ConfigError of a few lines and what
the unchanged file gives (of a gin file: any configuration, as a changed value is a value). Anything else, a library's
exception, other tokens, other bits, more than `SLOW_SECONDS`, is a fault: it is printed with its number, and the exit
code is 1. Not tried: another file of the very same size in a token store's place, which `TokenStore.verify` tells.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palmjax import checkpoint, configure
from palmjax.checkpoint import seal
from palmjax.config import ConfigError, SaveCheckpointConfig
from palmjax.data.store import Folder, PartWriter, TokenStore, write_manifest
from palmjax.data.vocabulary import Bytes
from palmjax.provenance import DataPosition, RunInfo
from palmjax.state import TrainState

SLOW_SECONDS = 60
GIN = """# A job as users write it.
include "run/train.gin"
include "models/palm.gin"
include "optim/palm_adafactor.gin"
include "data/text_files.gin"

VOCAB_SIZE = 264
Decoder.num_layers = 2
Decoder.d_model = 64
Decoder.dtype = "float32"
Attention.num_heads = 4
Attention.head_dim = 16
SwiGLU.d_ff = 128
TASK_FEATURE_LENGTHS = {"targets": 64}
BATCH_SIZE = @BatchRamp()
BatchRamp.stages = ((0, 8), (100, 16))
TRAIN_STEPS = 40
MODEL_DIR = "/nowhere/run"
TRAIN_FILES = ("/nowhere/a*.txt", "/nowhere/b*.txt")
SaveCheckpointConfig.period = 5
SaveCheckpointConfig.keep = None
MeshConfig.data = -1
TrainConfig.log_period = 5
"""

WORDS = [
    *(
        "=",
        "@",
        "%",
        "(",
        ")",
        "()",
        "{",
        "}",
        "[",
        "'",
        '"',
        "\\",
        "\n",
        " ",
        "\t",
        "\0",
        "/",
        ".",
        "-",
        "#",
        "\u00e9",
    ),
    *("1e999", "-1", "nan", "None", "True", "10**9", "9" * 400, "0x", "[" * 200, "include", "import", "gin.REQUIRED"),
]


def mutate_text(text: str, rng: random.Random) -> str:
    """A text with one to three changes: characters, words, lines; cut, doubled, moved, swapped."""
    for _ in range(rng.randint(1, 3)):
        lines = text.split("\n")
        at, line = rng.randrange(len(text) + 1), rng.randrange(len(lines))
        match rng.randrange(9):
            case 0:
                text = text[:at] + rng.choice(WORDS) + text[at:]
            case 1:
                text = text[:at] + text[at + rng.randint(1, 8) :]
            case 2:
                text = text[:at]
            case 3:
                del lines[line]
                text = "\n".join(lines)
            case 4:
                lines.insert(rng.randrange(len(lines) + 1), lines[line])
                text = "\n".join(lines)
            case 5:
                other = rng.randrange(len(lines))
                lines[line], lines[other] = lines[other], lines[line]
                text = "\n".join(lines)
            case 6:
                text = text[:at] + chr(rng.randrange(32, 0x250)) + text[at + 1 :]
            case 7:
                # A value of one line for another's.
                values = [i for i, one in enumerate(lines) if "=" in one]
                if len(values) > 1:
                    a, b = rng.sample(values, 2)
                    lines[a] = lines[a].split("=", 1)[0] + "=" + lines[b].split("=", 1)[1]
                text = "\n".join(lines)
            case _:
                words = text.split(" ")
                words[rng.randrange(len(words))] = rng.choice(WORDS)
                text = " ".join(words)
    return text


def mutate_bytes(data: bytes, rng: random.Random, donors: Sequence[bytes] = ()) -> bytes:
    """Bytes with a change: a bit, a cut, an insertion, a part zeroed or doubled, or another file's bytes instead."""
    value = bytearray(data)
    at = rng.randrange(max(1, len(value)))
    match rng.randrange(8):
        case 0 | 1:
            if value:
                value[at] ^= 1 << rng.randrange(8)
        case 2:
            del value[at:]
        case 3:
            value[at:at] = rng.randbytes(rng.randint(1, 16))
        case 4:
            del value[at : at + rng.randint(1, 16)]
        case 5:
            value[at : at + 16] = bytes(len(value[at : at + 16]))
        case 6:
            value += value[at:]
        case _:
            value = bytearray(rng.choice(donors)) if donors else bytearray()
    return bytes(value)


@dataclasses.dataclass
class Tally:
    """What came of the mutations. faults: a line for each that is neither of the two allowed things."""

    right: int = 0
    errors: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)

    def count(self, name: str, attempt: Callable[[], bool]) -> None:
        """attempt: returns whether the result is right."""
        began = time.monotonic()
        try:
            if attempt():
                self.right += 1
            else:
                self.faults.append(f"{name}: another result")
        except ConfigError as error:
            self.errors += 1
            if len(str(error).splitlines()) > 5 or len(str(error)) > 2000:
                self.faults.append(f"{name}: {len(str(error))} characters of error")
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            self.faults.append(f"{name}: {type(error).__name__} in {at.filename}:{at.lineno}: {str(error)[:120]}")
        if time.monotonic() - began > SLOW_SECONDS:
            self.faults.append(f"{name}: took {time.monotonic() - began:.0f} s")


def gin_files(folder: Path, count: int, seed: int) -> Tally:
    """Mutated configurations, loaded as `palmjax train` does."""
    tally, file = Tally(), folder / "job.gin"
    for number in range(count):
        rng = random.Random(f"gin {seed} {number}")
        file.write_text(mutate_text(GIN, rng))
        tally.count(f"gin {number}", lambda: bool(configure.load([str(file)], []).flat()))
    return tally


def _store(folder: Path) -> None:
    target, vocabulary, rng = Folder(str(folder)), Bytes(), np.random.default_rng(0)
    records = []
    for part in range(2):
        writer = PartWriter(target, part, vocabulary)
        for _ in range(20):
            writer.add(rng.integers(3, 259, rng.integers(5, 2000)), num_unweighted=3 * part)
        records.append(writer.finish())
    write_manifest(target, "task", "train", vocabulary, records)


def _read_store(folder: Path) -> list[Any]:
    store = TokenStore(str(folder))
    starts = np.arange(0, store.num_tokens, 1000)
    tokens, weights = store.read(starts, np.minimum(starts + 1000, store.num_tokens), 1000)
    return [tokens, weights, store.document_ends(), np.array(store.fingerprint)]


def store_files(folder: Path, count: int, seed: int) -> Tally:
    """Mutated files of a token store, opened and read from one end to the other."""
    tally, good, bad = Tally(), folder / "store", folder / "changed"
    _store(good)
    shutil.copytree(good, bad)
    want, names = _read_store(good), Folder(str(good)).names()
    for number in range(count):
        rng = random.Random(f"store {seed} {number}")
        name = rng.choice(names)
        data = (good / name).read_bytes()
        others = [other for n in names if len(other := (good / n).read_bytes()) != len(data)]
        (bad / name).write_bytes(mutate_bytes(data, rng, others))

        def attempt() -> bool:
            return all(np.array_equal(a, b) for a, b in zip(_read_store(bad), want, strict=True))

        tally.count(f"store {number}, {name}", attempt)
        (bad / name).write_bytes(data)
    return tally


def _state() -> TrainState:
    params = {"w": jnp.arange(48, dtype=jnp.float32).reshape(6, 8), "b": jnp.ones(8, jnp.bfloat16)}
    return TrainState(step=jnp.int32(3), params=params, opt_state=({"m": jnp.ones(8)},), rng=jnp.zeros(2, jnp.uint32))


def checkpoint_files(folder: Path, count: int, seed: int) -> Tally:
    """Mutated metadata of a checkpoint, restored. Every second `info` is one whose checksum was made behind the
    damage: it must be read as some RunInfo or refused.
    """
    tally, good, bad = Tally(), folder / "run" / "checkpoint_3", folder / "changed" / "checkpoint_3"
    state = _state()
    info = RunInfo(
        seed=7,
        data=DataPosition(first_row=96, skips=((10, 20),), fingerprint="abc"),
        config="# gin",
        flat_config={"train.seed": "7"},
        vocabulary=Bytes(),
        mesh={"data": 1},
        code={"palmjax": "0"},
        libraries={"jax": "0"},
    )
    with checkpoint.Checkpointer(str(good.parent), SaveCheckpointConfig()) as saver:
        saver.save(3, state, info)
    shutil.copytree(good, bad)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)

    def restored() -> bool:
        back = jax.tree.leaves(checkpoint.restore_state(bad, like))
        return all(a.tobytes() == b.tobytes() for a, b in zip(map(np.asarray, back), leaves, strict=True))

    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    names = [name for name in [*seal.files(good), seal.FILE] if "/d/" not in name]
    whole = {name: (good / name).read_bytes() for name in names}
    for number in range(count):
        rng = random.Random(f"checkpoint {seed} {number}")
        name = rng.choice([*names, *["info/metadata"] * 5])
        changed = mutate_bytes(whole[name], rng, list(whole.values()))
        if rng.random() < 0.5:
            changed = mutate_text(whole[name].decode("latin1"), rng).encode()
        (bad / name).write_bytes(changed)
        resealed = name == "info/metadata" and rng.random() < 0.5
        if resealed:
            seal.write(bad)
        attempt = (lambda: bool(checkpoint.read_info(bad))) if resealed else restored
        tally.count(f"checkpoint {number}, {name}", attempt)
        for other in (name, seal.FILE):
            (bad / other).write_bytes(whole[other])
    return tally


CAMPAIGNS = {"gin files": gin_files, "store files": store_files, "checkpoint metadata": checkpoint_files}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="mutations of each kind (1000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    faults = 0
    for name, campaign in CAMPAIGNS.items():
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            began = time.monotonic()
            tally = campaign(Path(folder), options.count, options.seed)
        faults += len(tally.faults)
        seconds = time.monotonic() - began
        print(f"{name}: {options.count} mutations, {tally.errors} clear errors, {tally.right} right results, "
              f"{len(tally.faults)} faults; {seconds:.0f} s")  # fmt: skip
        print("\n".join(f"  {fault}" for fault in tally.faults[:20]), end="\n" if tally.faults else "")
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
