"""seqio Task or Mixture -> token stores. The only module of the library that touches seqio and TensorFlow.

They are imported inside functions: whoever reads a finished store never loads them. A task's source is cut in parts,
each written by `write_part` alone, in this process, in spawned ones or in Apache Beam's: the bytes are the same. A
finished part leaves a record; a build that was killed goes on with the parts that have none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fcntl
import functools
import importlib
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from palmjax.config import ConfigError, DatasetConfig, TaskPart
from palmjax.data import index, workers
from palmjax.data.index import Source
from palmjax.data.progress import BuildProgress
from palmjax.data.store import FORMAT, Folder, PartWriter, is_complete, part_name, write_manifest
from palmjax.data.vocabulary import Bytes, HuggingFace, PassThrough, SentencePiece, Vocabulary
from palmjax.quiet import quiet_libraries

MAX_PARTS = 1024
ARBITRARY_PARTS = 64  # for a source that can be cut in any number of parts
REPORT_EVERY = 256  # documents between reports of progress


@dataclasses.dataclass(frozen=True)
class StoreJob:
    """One store to build: a task's split. Plain values, so that another process can do a part of it."""

    task: str
    split: str
    use_cached: bool
    modules: tuple[str, ...]
    tasks: tuple[TaskPart, ...]
    path: str
    num_parts: int


def build_stores(config: DatasetConfig) -> list[Source]:
    """Builds what is not built yet of the config's stores, and returns all of them with their rates.

    Raises ConfigError for an unknown task or split, a task without token features, and text that is empty or broken.
    """
    sources, jobs = plan(config)
    for job in jobs:
        with _storage_errors(job.path), _locked(job.path):
            if not is_complete(job.path):
                _build_store(job, config.workers)
    with _storage_errors(config.store_dir):
        index.save(config, sources)
    return sources


def plan(config: DatasetConfig) -> tuple[list[Source], list[StoreJob]]:
    """The stores that a config means, and for each the job that builds it. Asks seqio; builds nothing."""
    provider = _find(config.mixture_or_task_name, config.modules, config.tasks)
    seqio = import_seqio()
    tasks = [task for task in seqio.get_subtasks(provider) if _has_split(task, config.split)]
    if not tasks:
        raise ConfigError(
            f"{provider.name!r} has no split {config.split!r}; it has: {', '.join(sorted(provider.splits))}"
        )
    rates = [_rate(provider, task) if isinstance(provider, seqio.Mixture) else 1.0 for task in tasks]
    sources, jobs = [], []
    fingerprints = {}
    for task, rate in zip(tasks, rates, strict=True):
        if rate == 0:
            continue
        vocabulary = _vocabulary(task)
        fingerprints.setdefault(vocabulary.fingerprint, task.name)
        job = StoreJob(
            task=task.name,
            split=config.split,
            use_cached=config.use_cached,
            modules=config.modules,
            tasks=config.tasks,
            path="",
            num_parts=_num_parts(task, config.split, config.use_cached),
        )
        files = () if config.use_cached else _local_files(task, config.split)
        state = index.files_state(files)
        path = f"{task.name}/{config.split}-{_store_fingerprint(job, vocabulary, state)}"
        sources.append(Source(task.name, path, rate, files, state))
        jobs.append(dataclasses.replace(job, path=f"{Folder(config.store_dir).path}/{path}"))
    if len(fingerprints) > 1:
        raise ConfigError(
            f"tasks of mixture {provider.name!r} differ in vocabulary: {', '.join(fingerprints.values())}"
        )
    if not sources:
        raise ConfigError(f"all rates of mixture {provider.name!r} are 0")
    return sources, jobs


def write_part(job: StoreJob, part: int, report: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Writes part `part` of a store, unless it is finished, and returns its record.

    Whatever an unfinished attempt left is discarded. `report` is called now and then with the numbers of documents and
    tokens written since it was called last. Raises ConfigError for documents that cannot be read.
    """
    folder = Folder(job.path)
    record_name = f"{part_name(part)}.json"
    if (data := folder.read(record_name)) is not None:
        return json.loads(data)
    task = _find(job.task, job.modules, job.tasks)
    vocabulary = _vocabulary(task)
    writer = PartWriter(folder, part, vocabulary)
    documents = tokens = empty = 0
    for inputs, targets in _documents(task, job, part):
        if len(targets) == 0 or (len(targets) == 1 and targets[0] == vocabulary.eos_id):
            empty += 1
            continue
        ends = [] if targets[-1] == vocabulary.eos_id else [vocabulary.eos_id]
        document = np.concatenate([inputs, targets, ends]).astype(np.int64)
        try:
            writer.add(document, num_unweighted=len(inputs))
        except ConfigError as error:
            raise ConfigError(f"task {job.task!r}, split {job.split!r}: {error}") from error
        documents, tokens = documents + 1, tokens + len(document)
        if report and documents == REPORT_EVERY:
            report(documents, tokens)
            documents = tokens = 0
    if report:
        report(documents, tokens)
    record = writer.finish() | {"empty": empty}
    folder.write(record_name, json.dumps(record).encode())
    return record


def publish(job: StoreJob) -> None:
    """Writes the manifest of a store whose parts are finished. Raises ConfigError if there is no text in them."""
    folder = Folder(job.path)
    records = []
    for part in range(job.num_parts):
        data = folder.read(f"{part_name(part)}.json")
        if data is None:
            raise ConfigError(f"token store {job.path}: part {part} of {job.num_parts} is not finished")
        records.append(json.loads(data))
    if not any(record["documents"] for record in records):
        empty = sum(record["empty"] for record in records)
        for name in folder.names():
            folder.delete(name)
        raise ConfigError(
            f"task {job.task!r}, split {job.split!r} has no text: "
            + (f"all of its {empty:,} documents are empty" if empty else "its source gives no documents")
        )
    write_manifest(folder, job.task, job.split, _vocabulary(_find(job.task, job.modules, job.tasks)), records)
    for part in range(job.num_parts):
        folder.delete(f"{part_name(part)}.json")


def run_beam(config: DatasetConfig, pipeline_options: Any = None) -> list[Source]:
    """`build_stores` with the parts mapped over an Apache Beam pipeline: for corpora of terabytes (extra `beam`).

    store_dir must be one that Beam's workers can write. Raises ConfigError if Apache Beam is not installed.
    """
    try:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("building with Apache Beam needs the extra `beam`: pip install 'palmjax[beam]'") from error
    sources, jobs = plan(config)
    for job in jobs:
        if is_complete(job.path):
            continue
        with beam.Pipeline(options=pipeline_options) as pipeline:
            parts = pipeline | beam.Create(range(job.num_parts)) | beam.Reshuffle()
            _ = parts | beam.Map(functools.partial(write_part, job))
        publish(job)
    index.save(config, sources)
    return sources


def _build_store(job: StoreJob, num_workers: int) -> None:
    folder = Folder(job.path)
    missing = [part for part in range(job.num_parts) if folder.read(f"{part_name(part)}.json") is None]
    source = _find(job.task, job.modules, job.tasks).source
    try:
        expected = source.num_input_examples(job.split)
    except Exception:  # a count is only for the time left; any source may fail to give one
        expected = None
    title = f"palmjax: tokenizing {job.task} ({job.split})"
    done = job.num_parts - len(missing)
    with BuildProgress(title, expected if not done else None) as progress:
        progress.parts(done, job.num_parts)
        run = functools.partial(write_part, job)
        for finished, _ in enumerate(workers.each_part(run, missing, num_workers, progress.add), start=done + 1):
            progress.parts(finished, job.num_parts)
    publish(job)


@contextlib.contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    """Makes a full or forbidden disk a ConfigError. TensorStore's errors are ValueErrors that begin with a code."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not re.match("[A-Z_]+: ", str(error)):
            raise
        raise ConfigError(
            f"cannot write the token store {path}: {_first_line(error)}\nThe next start goes on from there."
        ) from error


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Holds the store's lock, so that two processes of one machine never build the same store at once.

    The lock is the operating system's: it goes when its holder dies. Remote stores have none; of a job's processes
    only the first builds.
    """
    if not Folder(path).is_local:
        yield
        return
    path = Folder(path).path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"palmjax: another process is building {path}; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def import_seqio() -> Any:
    """seqio, imported without TensorFlow's start-up chatter, and with the accelerators left to JAX."""
    import absl.logging

    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        with warnings.catch_warnings(), quiet_libraries():
            warnings.simplefilter("ignore")
            import seqio
            import tensorflow as tf

            for kind in ("GPU", "TPU"):
                with contextlib.suppress(ValueError, RuntimeError):
                    tf.config.set_visible_devices([], kind)
    except ImportError as error:
        raise ConfigError(f"building a token store needs seqio and TensorFlow: {error}") from error
    finally:
        absl.logging.set_verbosity(verbosity)
    return seqio


def _find(name: str, modules: tuple[str, ...], tasks: tuple[TaskPart, ...]) -> Any:
    """The seqio Task or Mixture of this name, after `modules` are imported and `tasks` registered."""
    seqio = import_seqio()
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"module {module!r}, which should register tasks, cannot be imported: {error}") from error
    for part in tasks:
        try:
            part.build()
        except (ValueError, OSError, ImportError) as error:
            raise ConfigError(f"task {part.name!r}: {error}") from error
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)[:3]
        searched = [*modules, *(type(part).__name__ for part in tasks)]
        raise ConfigError(
            f"no seqio Task or Mixture named {name!r}; "
            + (f"nearest: {', '.join(near)}. " if near else "none is registered. ")
            + (
                f"Searched: {', '.join(searched)}"
                if searched
                else "Import the module that registers it, or set `tasks`"
            )
        )
    return seqio.get_mixture_or_task(name)


def _has_split(task: Any, split: str) -> bool:
    return split in task.splits or "[" in split  # TFDS cuts splits by expressions such as train[:90%]


def _rate(mixture: Any, task: Any) -> float:
    try:
        rate = float(mixture.get_rate(task))
    except Exception as error:  # rates may be any user's function
        raise ConfigError(
            f"mixture {mixture.name!r}: the rate of task {task.name!r} cannot be computed: {error}"
        ) from error
    if not np.isfinite(rate) or rate < 0:
        raise ConfigError(f"mixture {mixture.name!r}: the rate of task {task.name!r} is {rate}")
    return rate


def _vocabulary(task: Any) -> Vocabulary:
    seqio = import_seqio()
    if "targets" not in task.output_features:
        raise ConfigError(
            f"task {task.name!r} has no feature 'targets'; its features are: {', '.join(task.output_features)}"
        )
    vocabulary = task.output_features["targets"].vocabulary
    if "inputs" in task.output_features and task.output_features["inputs"].vocabulary != vocabulary:
        raise ConfigError(f"task {task.name!r}: 'inputs' and 'targets' differ in vocabulary; one stream needs one")
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return Bytes(extra_ids=vocabulary.extra_ids)
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        try:
            return SentencePiece(vocabulary.sp_model)  # pyright: ignore[reportArgumentType]
        except Exception as error:  # TensorFlow's file errors and the library's parse errors
            path = vocabulary.sentencepiece_model_file
            raise ConfigError(f"task {task.name!r}: cannot load the SentencePiece model {path!r}: {error}") from error
    if (path := getattr(vocabulary, "tokenizer_file", None)) is not None:  # tasks.huggingface
        return HuggingFace.read(Path(path))
    if isinstance(vocabulary, seqio.PassThroughVocabulary):
        return PassThrough(num_ids=vocabulary.vocab_size, eos=1 if vocabulary.eos_id is None else vocabulary.eos_id)
    raise ConfigError(
        f"task {task.name!r} uses {type(vocabulary).__name__}; a token store can carry ByteVocabulary, "
        "SentencePieceVocabulary, PassThroughVocabulary or a Hugging Face tokenizer (tasks.huggingface)"
    )


def _num_parts(task: Any, split: str, use_cached: bool) -> int:
    """Parts of a store: the source's own shards, so that it does not depend on who builds it."""
    try:
        source = task._get_cached_source(split) if use_cached and task.supports_caching else task.source  # seqio 0.0.20
        shards = len(source.list_shards(split))
    except Exception as error:  # sources are anyone's; TFDS raises its own kinds for data that is not there
        raise ConfigError(f"task {task.name!r}, split {split!r}: {_first_line(error)}") from error
    if shards == 0:
        raise ConfigError(f"task {task.name!r}, split {split!r}: its source has no files")
    return ARBITRARY_PARTS if source.supports_arbitrary_sharding else min(shards, MAX_PARTS)


def _local_files(task: Any, split: str) -> tuple[str, ...]:
    """Patterns of the local files that a task reads; none if its source is no seqio FileDataSource."""
    patterns = getattr(task.source, "_split_to_filepattern", {}).get(split, ())  # seqio 0.0.20
    patterns = [patterns] if isinstance(patterns, str | os.PathLike) else patterns
    return tuple(os.path.abspath(pattern) for pattern in map(str, patterns) if "://" not in pattern)


def _store_fingerprint(job: StoreJob, vocabulary: Vocabulary, state: str) -> str:
    """What decides a store's content: of a task made from values those, of any other the sources of all modules, for
    which of them registers it isn't known, and the `state` of the files that it reads, "" if that isn't known.
    """
    mine = [part for part in job.tasks if part.name == job.task]
    values = [[index.values_of(part), index.content_of(part)] for part in mine]
    made = values or sorted(source for source in index.sources_of(job.modules).values() if source)
    made += [state] if state else []
    return index.digest([FORMAT, job.task, job.split, job.use_cached, vocabulary.fingerprint, job.num_parts, made])


def _documents(task: Any, job: StoreJob, part: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets) token ids of each document of a part; inputs are empty for a task without them."""
    seqio = import_seqio()
    keys = [key for key in ("inputs", "targets") if key in task.output_features]
    none = np.zeros(0, np.int64)
    try:
        dataset = task.get_dataset(
            sequence_length=None,
            split=job.split,
            use_cached=job.use_cached,
            shuffle=False,
            seed=_seed(task),
            shard_info=seqio.ShardInfo(part, job.num_parts) if job.num_parts > 1 else None,
            try_in_mem_cache=False,
        )
        for example in dataset.map(lambda example: {key: example[key] for key in keys}).as_numpy_iterator():
            yield example.get("inputs", none), example["targets"]
    except Exception as error:  # TensorFlow wraps what a source raises; our sources keep the original
        cause = getattr(task.source, "failure", None) or error
        raise ConfigError(f"task {job.task!r}, split {job.split!r}: {_first_line(cause)}") from error


def _seed(task: Any) -> int | None:
    """A fixed seed for random preprocessors. seqio hands it to the source too, and a function may not take one."""
    function = getattr(task.source, "_dataset_fn", None)  # seqio 0.0.20, FunctionDataSource
    return 0 if function is None or "seed" in inspect.signature(function).parameters else None


def _first_line(error: BaseException) -> str:
    """What went wrong; of TensorFlow's tracebacks as text ("in user code:") the last line, and where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0] == "in user code:":
        places = [found for line in lines if (found := re.match(r'File "(.+)", line (\d+)', line))]
        return lines[-1] + (f" ({places[-1][1]}:{places[-1][2]})" if places else "")
    return lines[0] if lines else type(error).__name__
