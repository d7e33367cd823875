"""`palmjax VERB ...`. Each verb is also `python -m` its module; nothing heavy is imported before the verb is known."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from palmjax import __version__, libtpu
from palmjax.config import ConfigError
from palmjax.files import exit_code_of, say, say_error

VERBS = {
    "train": ("palmjax.train", "train a model from gin files; run again to resume"),
    "eval": ("palmjax.evaluation.main", "held-out loss of a checkpoint, or its scores on benchmarks; compare, verify"),
    "lm-eval": ("palmjax.interop.lm_eval", "EleutherAI's lm-eval tasks on a checkpoint"),
    "replay": ("palmjax.replay", "compute one step of a run again, bit for bit, and show what it read"),
    "generate": ("palmjax.decode.main", "continue a prompt with a checkpoint"),
    "report": ("palmjax.report.main", "one page about a run: curves, what went wrong, where the time went"),
    "plan": (
        "palmjax.plan.main",
        "compile the train step for any pod: does it fit, how fast is it, which layout is best",
    ),
    "models": ("palmjax.zoo", "every shipped model: parameters, FLOPs and cache beside the published figures"),
    "convert": ("palmjax.interop.convert", "weights of Hugging Face and T5X to a checkpoint, and back"),
    "checkpoint": ("palmjax.checkpoint.main", "verify, list, compare and prune the checkpoints of a run"),
    "config": ("palmjax.configure", "print a configuration as it will run, and where each value was set"),
    "tokenizer": ("palmjax.tokenizer", "train a SentencePiece vocabulary"),
}
"""Verb to its module, whose `main(argv) -> int` it runs, and a line of help."""

HELP = "\n".join(
    [
        "usage: palmjax VERB [FILE.gin ...] [--gin.KEY=VALUE ...]",
        "",
        *(f"  {verb:10} {line}" for verb, (_, line) in VERBS.items()),
        "",
        "palmjax VERB --help tells more; palmjax --version prints the version.",
        "Start with: palmjax train gin/exp/palm_stdlib.gin --gin.MODEL_DIR=runs/first",
    ]
)


def run_main(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Runs a verb's main: a ConfigError is one or two lines on stderr and its exit code (2), Ctrl-C is 130.

    An OSError that nobody expected is one line, which says where it came from; with PALMJAX_TRACEBACK=1 either is
    behind its traceback. Any other exception is ours and keeps it.
    Modules in the working directory can be imported by gin's `import` lines; it comes last on the path, so nothing
    there shadows an installed package.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    libtpu.settle()
    try:
        return main(argv)
    except ConfigError as error:
        say_error(error)
        return error.exit_code
    except OSError as error:
        say_error(error)
        return exit_code_of(error)
    except KeyboardInterrupt:
        say("interrupted")
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Finds the verb and runs it. Returns the process's exit code."""
    verb, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if verb in ("--help", "-h", "help"):
        print(HELP)
        return 0
    if verb in ("--version", "version"):
        print(f"palmjax {__version__}")
        return 0
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"verbs are {', '.join(VERBS)}"
        print(f"error: palmjax has no verb {verb!r}; {hint}", file=sys.stderr)
        return 2
    return run_main(lambda given: importlib.import_module(VERBS[verb][0]).main(given), rest)


if __name__ == "__main__":
    raise SystemExit(main())
