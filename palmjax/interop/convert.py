"""`palmjax convert SOURCE DEST`: weights of transformers and T5X to a palmjax checkpoint, and back."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from palmjax.config import ConfigError
from palmjax.interop import converted, experiment, safetensors_files, transfer
from palmjax.interop.huggingface import families, folder
from palmjax.interop.huggingface.family import Family, architecture
from palmjax.interop.orbax_arrays import Reader
from palmjax.interop.progress import Progress
from palmjax.interop.staging import Staging
from palmjax.models.decoder import Decoder

BESIDE = "huggingface"
"""Folder beside a converted checkpoint with the files that travel along."""

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def _fingerprint(files: Sequence[Path]) -> list[Any]:
    """Name, size and time of change of each file: what tells that a source is still the one it was."""
    states = [(path, path.stat()) for path in sorted(set(files))]
    return [[str(path), state.st_size, state.st_mtime_ns] for path, state in states]


# --- transformers to palmjax ---------------------------------------------------------------------------------------


def from_huggingface(source: Path, target: Path, bindings: Sequence[str] = ()) -> str:
    """Converts a folder of transformers into the MODEL_DIR `target`. Returns the checkpoint's path.

    bindings: gin over the written finetune.gin. Raises ConfigError, and leaves nothing, for a source that does not
    agree with itself or with palmjax; what a killed conversion has written is kept and gone on from.
    """
    from palmjax import configure

    given = folder.read(source)
    vocabulary, file = folder.vocabulary(source, given.config)
    beside = target / BESIDE
    text = experiment.finetuning(
        given.model,
        origin=f"{given.family.architecture} of {source.name}",
        folder=str(target),
        vocabulary=None if file is None else str(beside / file.name),
        length=min(folder.max_length(given.config), experiment.LONGEST_ROW),
        step=0,
    )
    loaded = _loaded(configure.load, text, bindings)
    model: Any = loaded.experiment.model
    if architecture(model) != architecture(given.model):
        raise ConfigError("the bindings make another model than config.json; only dtype, remat and the like can change")
    files = [tensor.file for tensor in given.tensors.values()]
    identity = {"from": _fingerprint([*files, source / "config.json"]), "config": loaded.operative, "step": 0}
    with converted.into(target, 0, identity) as checkpoint:
        shapes = converted.full_shapes(model)
        total = 4 * sum(math.prod(tensor.shape) for tensor in given.planned.values())
        with Progress(f"{given.family.model_type} to palmjax", total) as progress:
            transfer.receive(
                given.planned,
                folder.Tensors(given.tensors),
                checkpoint.writer,
                shapes,
                checkpoint.staging,
                progress,
            )
        checkpoint.arrays = {("params", *path): ("float32", shape) for path, shape in shapes.items()}
        beside.mkdir(exist_ok=True)
        for name in folder.CARRIED:
            if (source / name).exists():
                shutil.copyfile(source / name, beside / name)
        (target / "finetune.gin").write_text(text)
        info = converted.run_info(
            loaded.experiment, loaded.operative, loaded.flat(), vocabulary, step=0, arrays=checkpoint.described()
        )
        checkpoint.commit(info)
        return str(checkpoint.staging.final)


def _loaded(load: Any, text: str, bindings: Sequence[str]) -> Any:
    """The configuration of a run file that is not written yet, with no text files named."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="palmjax-") as place:
        file = Path(place) / "finetune.gin"
        file.write_text(text)
        return load([str(file)], ["TRAIN_FILES = ()", *bindings])


# --- palmjax to transformers ---------------------------------------------------------------------------------------


def to_huggingface(
    source: str,
    target: Path,
    *,
    dtype: str | None = None,
    model_type: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    bindings: Sequence[str] = (),
) -> str:
    """Writes a palmjax checkpoint as a folder that transformers loads. Returns its path.

    dtype: of the tensors, None for that of the files it was converted from, or float32. model_type: the family, None
    for the first that has the model. Raises ConfigError if no family has it, or `target` is not empty.
    """
    from palmjax import configure, trained
    from palmjax.checkpoint import describe, read_info
    from palmjax.model_dir import resolve

    path = resolve(source)
    info = read_info(path)
    with trained.config_file(path, info) as file:
        model: Any = configure.load([file], list(bindings)).experiment.model
    _check_saved(path, info.arrays, describe({"params": model.build().abstract_params()}))
    beside = Path(path).parent / BESIDE
    family, config = _configuration(path, model, model_type, beside)
    name = dtype or _stored_dtype(beside) or "float32"
    config |= {"dtype": name, "torch_dtype": name}
    planned = family.plan(model)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; choose another folder")
    identity = {
        "from": _fingerprint([Path(path) / "state" / "manifest.ocdbt"]),
        "config": config,
        "shards": max_shard_bytes,
    }
    staging = Staging(target.absolute(), identity)
    wanted = [(tensor.name, DTYPES[name], tensor.shape) for tensor in planned.values()]
    try:
        placed = safetensors_files.create(staging.folder, wanted, max_shard_bytes)
    except OSError as error:
        staging.abandon()
        raise ConfigError(f"{target} can't be written: {error.strerror}") from error
    total = 4 * sum(math.prod(tensor.shape) for tensor in planned.values())
    with Progress(f"palmjax to {family.model_type}", total) as progress:
        reader = Reader(Path(path) / "state")
        transfer.send(planned, reader, folder.Tensors(placed, writable=True), staging, progress)
    _write_beside(staging.folder, beside, config, info.vocabulary)
    staging.commit()
    return str(target)


def _check_saved(path: str, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    for name, what in wanted.items():
        if saved.get(name) != what:
            there = saved.get(name, "no such array")
            raise ConfigError(f"{path}: {name} is {there} in the checkpoint, and {what} in its configuration")


def _configuration(path: str, model: Decoder, model_type: str | None, beside: Path) -> tuple[Family, dict[str, Any]]:
    """The family and the config.json of a model: the one it was converted from, if it still describes it."""
    config_file = beside / "config.json"
    carried = json.loads(config_file.read_text()) if config_file.exists() else {}
    if carried and model_type in (None, carried["model_type"]):
        family = families.named(carried["model_type"], str(config_file))
        if architecture(family.model(carried, str(config_file))) == architecture(model):
            return family, carried
    if model_type is None:
        return families.holding(model, path)
    family = families.named(model_type, "--model_type")
    if (config := family.config(model)) is None:
        held, _ = families.holding(model, path)
        raise ConfigError(f"--model_type={model_type}: {path} is no such model; {held.model_type!r} has it")
    return family, config


def _stored_dtype(beside: Path) -> str | None:
    """dtype of the files that a checkpoint was converted from, if it was and they are of one that is written."""
    if not (beside / "config.json").exists():
        return None
    config = json.loads((beside / "config.json").read_text())
    name = config.get("dtype", config.get("torch_dtype"))
    return name if name in DTYPES else None


def _write_beside(into: Path, beside: Path, config: Mapping[str, Any], vocabulary: Any) -> None:
    """config.json and the tokenizer's files: those that travelled along, or what the checkpoint itself carries."""
    (into / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in folder.CARRIED[1:]:
        if (beside / name).exists():
            shutil.copyfile(beside / name, into / name)
    if not any(into.glob("tokenizer*")):
        for name, content in folder.tokenizer_files(vocabulary).items():
            (into / name).write_bytes(content)


# --- the verb ------------------------------------------------------------------------------------------------------


def _kind(source: Path) -> str:
    """ "huggingface" or "palmjax", by what the folder holds."""
    if not source.is_dir():
        raise ConfigError(f"there is no folder {source}")
    if (source / "config.json").exists():
        return "huggingface"
    return "palmjax"


def _size(text: str) -> int:
    """Bytes of "5GB", "500MB" or a number."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], text[-2:].upper()) if text[-2:].upper() in units else (text, "")
    try:
        size = int(float(number) * units.get(unit, 1))
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"--max_shard_size={text}: must be a size, such as 5GB or 500MB")
    return size


def _flags() -> argparse.ArgumentParser:
    from palmjax import configure

    parser = argparse.ArgumentParser(
        prog="palmjax convert",
        description="Convert weights: a folder of Hugging Face transformers or a T5X checkpoint to a palmjax "
        "checkpoint, and a palmjax checkpoint to either. Tensors pass through one by one; no device is used. "
        "Killed anywhere, the same command goes on.",
        epilog=configure.USAGE
        + "\nexamples: palmjax convert Llama-2-7b-hf runs/llama"
        + "\n          palmjax convert runs/mine Llama-2-7b-mine --dtype bfloat16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a folder with config.json and safetensors, or a checkpoint, or a MODEL_DIR")
    add("dest", metavar="DEST", help="a new folder")
    add("--to", choices=("palmjax", "huggingface"), help="default: palmjax, or huggingface for a palmjax checkpoint")
    add(
        "--dtype", choices=tuple(DTYPES), help="of the tensors written for transformers (that they came in, or float32)"
    )
    add("--model_type", metavar="TYPE", help="the family to write, where several have the model")
    add("--max_shard_size", default="5GB", metavar="SIZE", help="of a safetensors file (5GB)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`palmjax convert SOURCE DEST [...]`: prints the path of what it wrote."""
    from palmjax import configure

    jax.config.update("jax_platforms", "cpu")  # the devices stay free for a run
    flags, rest = configure.parse_flags(sys.argv[1:] if argv is None else argv)
    options = _flags().parse_args(rest)
    source, target = Path(options.source).expanduser(), Path(options.dest).expanduser().absolute()
    kind = _kind(source)
    to = options.to or ("huggingface" if kind == "palmjax" else "palmjax")
    if kind == "huggingface" and to == "palmjax":
        print(from_huggingface(source, target, flags.bindings))
    elif kind == "palmjax" and to == "huggingface":
        written = to_huggingface(
            str(source),
            target,
            dtype=options.dtype,
            model_type=options.model_type,
            max_shard_bytes=_size(options.max_shard_size),
            bindings=flags.bindings,
        )
        print(written)
    else:
        raise ConfigError(f"{source} is a {kind} folder and --to={to}: there is nothing to convert")
    return 0


if __name__ == "__main__":
    from palmjax.cli import run_main

    raise SystemExit(run_main(main))
