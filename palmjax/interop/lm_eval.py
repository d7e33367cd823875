"""EleutherAI's lm-evaluation-harness on a checkpoint. `palmjax lm-eval --checkpoint DIR --tasks ...`

lm-eval's own command line can't find a model of another package (0.4.13 reads no entry points), so this verb registers
ours under the name `palmjax` and then calls that command line, whose flags it hands on. From Python:

    from palmjax.interop import lm_eval as backend
    lm_eval.simple_evaluate(model=backend.load("runs/first"), tasks=[...])
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from palmjax.config import ConfigError

COMMANDS = ("ls", "validate")
"""Of lm-eval, besides `run`: they need no model."""

WRITTEN = ("--output_path", "-o")
"""lm-eval's flags that name what it writes: on the first process only."""


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(f"lm-eval is not installed ({error}): pip install 'palmjax[lm-eval]'")


def load(
    checkpoint: str,
    files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    **given: Any,
) -> Any:
    """The model of a checkpoint folder, or of a MODEL_DIR's newest one, for lm-eval's Python API.

    files, bindings, search_paths: gin over the checkpoint's configuration. given: as `lm_eval_model.PalmJax` takes
    them. Raises ConfigError if there is no such checkpoint, or lm-eval is not installed.
    """
    return _opener(checkpoint, files, bindings, search_paths)(**given)


def _opener(checkpoint: str, files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]) -> Any:
    """A subclass of `PalmJax` that knows its checkpoint."""
    try:
        from palmjax.interop.lm_eval_model import PalmJax
    except ImportError as error:
        raise _missing(error) from error
    from palmjax import trained
    from palmjax.data import feed

    opened = _open(checkpoint, files, bindings, search_paths)
    trained.enable_compilation_cache(opened.experiment.train.compilation_cache)
    params, length = opened.params(), feed.row_length(opened.experiment.train_dataset)

    class OfCheckpoint(PalmJax):
        def __init__(self, **given: Any):
            super().__init__(opened, params, trained_length=length, **given)

    return OfCheckpoint


def _open(checkpoint: str, files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]) -> Any:
    from palmjax import model_dir, trained
    from palmjax.checkpoint import read_info

    path = model_dir.resolve(checkpoint)
    info = read_info(path)
    with trained.config_file(path, info) as file:
        experiment = _configured([file, *files], bindings, search_paths)
    if "prefix" in experiment.train_dataset.packing.batch_fields:
        raise ConfigError(f"{path} is a prefix language model: lm-eval's requests do not say what is prefix")
    return trained.open_checkpoint(path, info, experiment)


def _configured(files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]) -> Any:
    from palmjax import configure

    return configure.load(list(files), list(bindings), list(search_paths)).experiment


def _flags() -> argparse.ArgumentParser:
    from palmjax import configure, distributed

    parser = argparse.ArgumentParser(
        prog="palmjax lm-eval",
        description="lm-eval's tasks on a checkpoint, on any mesh. All other flags are lm-eval's own "
        "(lm-eval run --help); --model_args sets max_length, add_bos_token, prefix_token_id, max_gen_toks, seed, "
        "chat_template, rows.",
        epilog=configure.USAGE
        + "\nexample: palmjax lm-eval --checkpoint runs/first --tasks lambada_openai --answers answers.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a checkpoint_N folder, or a MODEL_DIR: its newest"
    )
    parser.add_argument("--answers", metavar="FILE", help="keep answers there, by content; none is computed twice")
    distributed.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`palmjax lm-eval --checkpoint DIR --tasks A,B [...]`: lm-eval's table."""
    from palmjax import configure, distributed

    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] and argv[0] in COMMANDS:
        return _harness(argv)
    flags, rest = configure.parse_flags(argv)
    options, theirs = _flags().parse_known_args(rest[1:] if rest[:1] == ["run"] else rest)
    if {"--model", "-M"} & {flag.partition("=")[0] for flag in theirs}:
        raise ConfigError("--model: the model is --checkpoint's")
    try:
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise _missing(error) from error
    with distributed.session(options), _only_the_first_writes(theirs) as theirs:
        model = _opener(options.checkpoint, flags.files, flags.bindings, flags.search_paths)
        made: list[Any] = []

        class Registered(model):
            def __init__(self, **given: Any):
                _check_model_args(given)
                super().__init__(**({"answers": options.answers} | given))
                made.append(self)

        model_registry.register("palmjax", target=Registered)
        code = _harness(["run", "--model", "palmjax", *theirs])
        for one in made:
            _print_counts(one.counts)
        return code


def _check_model_args(given: Mapping[str, Any]) -> None:
    from palmjax.configure.names import nearest
    from palmjax.interop.lm_eval_model import PalmJax

    known = {name: one for name, one in inspect.signature(PalmJax).parameters.items() if one.default is not one.empty}
    for name in given:
        if name not in known:
            close = nearest(name, known, prefix="")
            hint = f"did you mean {close!r}?" if close else f"it sets {', '.join(known)}"
            raise ConfigError(f"--model_args: there is no {name!r}; {hint}")


def _print_counts(counts: dict[str, int]) -> None:
    """Below lm-eval's table, whatever was not asked as it is written."""
    for name, count in counts.items():
        if count:
            print(f"{count:,} requests: {name.replace('_', ' ')}", flush=True)


@contextlib.contextmanager
def _only_the_first_writes(flags: list[str]) -> Iterator[list[str]]:
    """lm-eval's flags for this process: processes but the first print nothing, and write where nobody looks."""
    import jax

    if jax.process_index() == 0:
        yield flags
        return
    with tempfile.TemporaryDirectory(prefix="palmjax-") as folder, contextlib.redirect_stdout(io.StringIO()):
        moved = list(flags)
        for place, flag in enumerate(flags):
            name, equals, _ = flag.partition("=")
            if name in WRITTEN:
                moved[place if equals else place + 1] = f"{name}={folder}" if equals else folder
        yield moved


def _settle_tables() -> None:
    """Makes an old pytablewriter print what lm-eval 0.4.13 means.

    Installers fall back to 0.38.0 of 2019 beside pandas 3.1, whose python-dateutil the later ones refuse. It has
    `header_list` for lm-eval's `headers`, of which it takes no notice, and forks to format, behind jax's threads.
    """
    import dataproperty
    from pytablewriter import MarkdownTableWriter

    formatter: Any = dataproperty.DataPropertyExtractor
    writer: Any = next(cls for cls in MarkdownTableWriter.__mro__ if "value_matrix" in vars(cls))
    if not hasattr(writer, "headers"):
        writer.headers = vars(writer)["header_list"]
        formatter.max_workers = property(lambda _: 1, lambda _, __: None)


UNKNOWN_TASKS = ("Tasks not found: ", "No tasks specified")
"""How lm-eval 0.4.13 begins to say that --tasks is wrong, as a ValueError."""


def _harness(flags: list[str]) -> int:
    """lm-eval's own command line. Raises ConfigError for a task that it does not know."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise _missing(error) from error
    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap would fork, behind jax's threads
    _settle_tables()
    before, sys.argv = sys.argv, ["palmjax lm-eval", *flags]
    try:
        cli_evaluate()
    except ValueError as error:
        if not str(error).startswith(UNKNOWN_TASKS):
            raise
        raise ConfigError(
            f"--tasks: {error}; `palmjax lm-eval ls tasks` lists them, --include_path adds yours"
        ) from error
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    from palmjax.cli import run_main

    raise SystemExit(run_main(main))
