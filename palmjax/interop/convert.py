"""`palmjax convert SOURCE DEST`: weights of transformers and T5X to a palmjax checkpoint, and back."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax

from palmjax import model_dir, trained
from palmjax.checkpoint import describe, read_info
from palmjax.checkpoint.arrays import Reader
from palmjax.config import ConfigError, section
from palmjax.data.vocabulary import PassThrough, Vocabulary
from palmjax.files import say
from palmjax.interop import converted, experiment, safetensors_files, transfer
from palmjax.interop.huggingface import families, folder
from palmjax.interop.huggingface.family import Family, architecture
from palmjax.interop.mapping import Tensor
from palmjax.interop.staging import Staging
from palmjax.interop.t5x import configuration, reading
from palmjax.interop.t5x import names as t5x_names
from palmjax.interop.t5x import transfer as t5x
from palmjax.models.decoder import Decoder
from palmjax.progress import Progress
from palmjax.provenance import RunInfo

BESIDE = "source"
"""Folder beside a converted checkpoint with the files that travel along: config.json, the tokenizer's."""

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def _fingerprint(files: Sequence[Path]) -> list[Any]:
    """Name, size and time of change of each file: what tells that a source is still the one it was."""
    states = [(path, path.stat()) for path in sorted(set(files))]
    return [[str(path), state.st_size, state.st_mtime_ns] for path, state in states]


@section
class RunFile:
    """finetune.gin of a conversion: `text` as it is written, and the configuration that the checkpoint carries."""

    text: str
    experiment: Any
    operative: str
    flat: Mapping[str, Any]


def _run_file(text: str, model: Decoder | None, files: Sequence[str], bindings: Sequence[str]) -> RunFile:
    """The run file `text` with a model: `model`, or the one that the user's gin `files` build."""
    from palmjax import configure

    def load(text: str, files: Sequence[str] = ()) -> Any:
        with tempfile.TemporaryDirectory(prefix="palmjax-") as place:
            file = Path(place) / "finetune.gin"
            file.write_text(text)
            return configure.load([str(file), *files], ["TRAIN_FILES = ()", *bindings])

    if model is None:
        model = cast(Decoder, load(text, files).experiment.model)
    text += experiment.model_bindings(model)
    loaded = load(text)
    if architecture(loaded.experiment.model) != architecture(model):
        raise ConfigError("the bindings make another model than the source; only dtype, remat and the like can change")
    return RunFile(text=text, experiment=loaded.experiment, operative=loaded.operative, flat=loaded.flat())


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` bytes are done; to be told of each few."""
    with Progress(title, total / 1e6, "MB") as progress:
        yield lambda moved: progress.advance(moved / 1e6)


def _receive(
    target: Path,
    step: int,
    run: RunFile,
    vocabulary: Vocabulary,
    planned: Mapping[str, Tensor],
    source: transfer.Source,
    *,
    files: Sequence[Path],
    carried: Sequence[Path],
    title: str,
) -> str:
    """Writes a checkpoint of `planned` tensors into the MODEL_DIR `target`. Returns its path.

    files: of the source; if one changes, an attempt that was cut off is not gone on from. carried: files that travel
    along.
    """
    identity = {"from": _fingerprint(files), "config": run.operative, "step": step}
    with converted.into(target, step, identity) as checkpoint:
        shapes = converted.full_shapes(run.experiment.model)
        total = 4 * sum(math.prod(tensor.shape) for tensor in planned.values())
        with _progress(title, total) as progress:
            transfer.receive(planned, source, checkpoint.writer, shapes, checkpoint.staging, progress)
        checkpoint.arrays = {("params", *path): ("float32", shape) for path, shape in shapes.items()}
        for file in carried:
            (target / BESIDE).mkdir(exist_ok=True)
            shutil.copyfile(file, target / BESIDE / file.name)
        (target / "finetune.gin").write_text(run.text)
        arrays = checkpoint.described()
        info = converted.run_info(run.experiment, run.operative, run.flat, vocabulary, step=step, arrays=arrays)
        checkpoint.commit(info)
        return str(checkpoint.staging.final)


# --- from other stacks ---------------------------------------------------------------------------------------------


def from_huggingface(source: Path, target: Path, bindings: Sequence[str] = (), ignored: Sequence[str] = ()) -> str:
    """Converts a folder of transformers into the MODEL_DIR `target`. Returns the checkpoint's path.

    bindings: gin over the written finetune.gin. ignored: keys of config.json to pass over, though unknown. Raises
    ConfigError, and leaves nothing, for a source that does not agree with itself or with palmjax; what a killed
    conversion has written is kept and gone on from.
    """
    given = folder.read(source, ignored)
    vocabulary, file = folder.vocabulary(source, given.config)
    if file is None:
        say(f"{source} has no tokenizer: its ids stand for no text")
    text = experiment.finetuning(
        origin=f"{given.family.architecture} of {source.name}",
        folder=str(target),
        vocabulary=None if file is None else str(target / BESIDE / file.name),
        length=min(folder.max_length(given.config), experiment.LONGEST_ROW),
        step=0,
    )
    return _receive(
        target,
        0,
        _run_file(text, given.model, (), bindings),
        vocabulary,
        given.planned,
        safetensors_files.Mapped(given.tensors),
        files=[*(tensor.file for tensor in given.tensors.values()), source / "config.json"],
        carried=[source / name for name in folder.CARRIED if (source / name).exists()],
        title=f"{given.family.model_type} to palmjax",
    )


def from_t5x(
    source: Path, target: Path, files: Sequence[str] = (), bindings: Sequence[str] = (), vocabulary: Path | None = None
) -> str:
    """Converts a T5X checkpoint, legacy or Orbax, into the MODEL_DIR `target`. Returns the checkpoint's path.

    files: gin files with a MODEL, where the tree's names and shapes do not tell the model. vocabulary: a SentencePiece
    model or a tokenizer.json; a T5X checkpoint carries none. Parameters and step are converted; moments stay behind, as
    they do behind every initial checkpoint.
    """
    found = reading.find(source)
    assert found is not None, source
    given = reading.read(found)
    tree = t5x_names.Tree({name: array.shape for name, array in given.target.items()}, str(found))
    ids = None if vocabulary is None else folder.vocabulary_of(vocabulary)
    if ids is None:
        named = configuration.vocabulary_file(found)
        given_by = "--vocabulary FILE gives one" if named is None else f"its run had --vocabulary {named}"
        say(f"{found} carries no vocabulary, so its ids stand for no text: {given_by}")
    text = experiment.finetuning(
        origin=f"T5X's {found.name}",
        folder=str(target),
        vocabulary=None if vocabulary is None else str(target / BESIDE / vocabulary.name),
        length=512,
        step=given.step,
    )
    run = _run_file(text, None if files else tree.model(), files, bindings)
    model = run.experiment.model
    planned = t5x.plan(model, tree.form, f"the tree of {found}")
    t5x.check(given, planned)
    return _receive(
        target,
        given.step,
        run,
        ids or PassThrough(num_ids=model.vocab_size),
        planned,
        t5x.Arrays(given.target),
        files=t5x.source_files(given),
        carried=[] if vocabulary is None else [vocabulary],
        title="T5X to palmjax",
    )


# --- to other stacks -----------------------------------------------------------------------------------------------


@section
class Opened:
    """A palmjax checkpoint whose arrays are those of its model."""

    path: Path
    info: RunInfo
    model: Any


def _open(source: str, bindings: Sequence[str]) -> Opened:
    from palmjax import configure

    path = model_dir.resolve(source)
    info = read_info(path)
    with trained.config_file(path, info) as file:
        model: Any = configure.load([file], list(bindings)).experiment.model
    for name, what in describe({"params": model.build().abstract_params()}).items():
        if (there := info.arrays.get(name, "no such array")) != what:
            raise ConfigError(f"{path}: {name} is {there} in the checkpoint, and {what} in its configuration")
    return Opened(path=Path(path), info=info, model=model)


def to_t5x(source: str, target: Path, *, dtype: str = "float32", bindings: Sequence[str] = ()) -> str:
    """Writes a palmjax checkpoint as a legacy T5X one into the MODEL_DIR `target`. Returns its path.

    A model of T5X's decoder-only network gets that network's names, any other palmjax's, which the adapter has. dtype:
    of the parameters.
    """
    opened = _open(source, bindings)
    form = t5x.form_of(opened.model)
    final = target / f"{model_dir.PREFIX}{opened.info.step}"
    if final.exists():
        raise ConfigError(f"{final} exists already; choose another folder")
    manifest = opened.path / "state" / "manifest.ocdbt"
    target.mkdir(parents=True, exist_ok=True)
    staging = Staging(final, {"from": _fingerprint([manifest]), "dtype": dtype, "form": str(form)})
    reader = Reader(opened.path / "state")
    planned = t5x.plan(opened.model, form, "T5X")
    copies = 3 if t5x.has_moments(reader) else 1
    total = 4 * copies * sum(math.prod(tensor.shape) for tensor in planned.values())
    with _progress("palmjax to T5X", total) as progress:
        t5x.send(planned, reader, staging, progress, dtype=dtype, step=opened.info.step)
    staging.commit()
    return str(final)


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
    opened = _open(source, bindings)
    model, beside = opened.model, opened.path.parent / BESIDE
    family, config = _configuration(str(opened.path), model, model_type, beside, opened.info.vocabulary)
    name = dtype or _stored_dtype(beside) or "float32"
    config |= {"dtype": name, "torch_dtype": name}
    planned = family.plan(model)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; choose another folder")
    identity = {
        "from": _fingerprint([opened.path / "state" / "manifest.ocdbt"]),
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
    with _progress(f"palmjax to {family.model_type}", total) as progress:
        reader = Reader(opened.path / "state")
        transfer.send(planned, reader, safetensors_files.Buffered(placed), staging, progress)
    _write_beside(staging.folder, beside, config, opened.info.vocabulary)
    staging.commit()
    return str(target)


def _configuration(
    path: str, model: Decoder, model_type: str | None, beside: Path, vocabulary: Vocabulary
) -> tuple[Family, dict[str, Any]]:
    """The family and the config.json of a model: the one it was converted from, if it still describes it.

    A new one names the vocabulary's own ids: transformers' defaults are those of another tokenizer.
    """
    config_file = beside / "config.json"
    carried = json.loads(config_file.read_text()) if config_file.exists() else {}
    if carried and model_type in (None, carried["model_type"]):
        family = families.named(carried["model_type"], str(config_file))
        if architecture(family.model(carried, str(config_file), ignored=None)) == architecture(model):
            return family, carried
    special = {"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_id}
    if model_type is None:
        family, config = families.holding(model, path)
        return family, config | special
    family = families.named(model_type, "--model_type")
    if (config := family.config(model)) is None:
        held, _ = families.holding(model, path)
        raise ConfigError(f"--model_type={model_type}: {path} is no such model; {held.model_type!r} has it")
    return family, config | special


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
        raise ConfigError(f"{source} is a file, not a folder" if source.exists() else f"there is no folder {source}")
    if (source / "config.json").exists():
        return "huggingface"
    return "palmjax" if reading.find(source) is None else "t5x"


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
    add("source", metavar="SOURCE", help="a folder with config.json and safetensors, a checkpoint, or a MODEL_DIR")
    add("dest", metavar="DEST", help="a new folder")
    add("--to", choices=("palmjax", "huggingface", "t5x"), help="default: palmjax; huggingface for its checkpoints")
    add("--dtype", choices=tuple(DTYPES), help="of the tensors that leave palmjax (float32, or what they came in)")
    add("--model_type", metavar="TYPE", help="the family of transformers to write, where several have the model")
    add("--max_shard_size", default="5GB", metavar="SIZE", help="of a safetensors file (5GB)")
    add("--ignore", nargs="+", default=[], metavar="KEY", help="of config.json: keys to pass over, though unknown")
    add("--vocabulary", metavar="FILE", help="of a T5X checkpoint: a SentencePiece model or a tokenizer.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`palmjax convert SOURCE DEST [...]`: prints the path of what it wrote."""
    from palmjax import configure

    jax.config.update("jax_platforms", "cpu")  # the devices stay free for a run
    flags, rest = configure.parse_flags(sys.argv[1:] if argv is None else argv)
    options = _flags().parse_args(rest)
    source, target = Path(options.source).expanduser(), Path(options.dest).expanduser().absolute()
    if source.absolute() == target:
        raise ConfigError(f"{target} is SOURCE and DEST: convert into a folder of its own")
    kind = _kind(source)
    to = options.to or ("huggingface" if kind == "palmjax" else "palmjax")
    match kind, to:
        case "huggingface", "palmjax":
            print(from_huggingface(source, target, flags.bindings, options.ignore))
        case "t5x", "palmjax":
            vocabulary = None if options.vocabulary is None else Path(options.vocabulary).expanduser()
            print(from_t5x(source, target, flags.files, flags.bindings, vocabulary))
        case "palmjax", "huggingface":
            size = _size(options.max_shard_size)
            chosen = {"dtype": options.dtype, "model_type": options.model_type, "max_shard_bytes": size}
            print(to_huggingface(str(source), target, bindings=flags.bindings, **chosen))
        case "palmjax", "t5x":
            print(to_t5x(str(source), target, dtype=options.dtype or "float32", bindings=flags.bindings))
        case _:
            raise ConfigError(f"{source} is of {kind} and --to={to}: convert to palmjax first, or leave out --to")
    return 0


if __name__ == "__main__":
    from palmjax.cli import run_main

    raise SystemExit(run_main(main))
