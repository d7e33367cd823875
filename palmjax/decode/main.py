"""`palmjax generate`: prompts continued with a checkpoint, on any mesh."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import jax

from palmjax.config import ConfigError
from palmjax.data.vocabulary import Vocabulary
from palmjax.decode.batches import ROWS, Continuation, generate
from palmjax.decode.beam import BeamSearch, PowerOfLength
from palmjax.decode.contrastive import ContrastiveSearch
from palmjax.decode.search import SearchPart
from palmjax.sampling import Greedy, SamplingPart, Temperature


def _encode(vocabulary: Vocabulary, text: str) -> list[int]:
    try:
        return vocabulary.encode(text)
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt {text[:40]!a} is not UTF-8 text") from error


def _read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of files, one a file, as they are."""
    prompts: list[str] = list(options.prompt or ())
    for name in options.prompt_file or ():
        try:
            if name == "-":
                prompts.append(sys.stdin.read())
            else:
                with open(name, encoding="utf-8", newline="") as file:
                    prompts.append(file.read())
        except OSError as error:
            raise ConfigError(f"--prompt_file={name} can't be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"--prompt_file={name} is not UTF-8 text: {error}") from error
    if not prompts:
        raise ConfigError("no prompt: give --prompt TEXT or --prompt_file FILE, each as often as you like")
    return prompts


def _sampling(options: argparse.Namespace) -> SamplingPart | SearchPart:
    """The way to continue that the flags name. Raises ConfigError for flags that exclude each other."""
    given = {"--temperature": options.temperature or None, "--beams": options.beams}
    given |= {"--contrastive": options.contrastive}
    ways = [flag for flag, value in given.items() if value is not None]
    if len(ways) > 1:
        raise ConfigError(f"{' and '.join(ways)} are ways to continue that exclude each other: give one")
    if options.length_penalty is not None and options.beams is None:
        raise ConfigError("--length_penalty compares the continuations of a beam search: add --beams 4")
    cuts = [flag for flag, value in (("--top_k", options.top_k), ("--top_p", options.top_p)) if value is not None]
    if options.contrastive is not None:
        cuts = [flag for flag in cuts if flag == "--top_p"]  # --top_k counts its candidates
    if cuts and not options.temperature:
        raise ConfigError(f"{' and '.join(cuts)} cut what is drawn from: add --temperature 1, since 0 draws nothing")
    if options.beams is not None:
        alpha = PowerOfLength.alpha if options.length_penalty is None else options.length_penalty
        return BeamSearch(beams=options.beams, length=PowerOfLength(alpha=alpha))
    if options.contrastive is not None:
        top_k = ContrastiveSearch.top_k if options.top_k is None else options.top_k
        return ContrastiveSearch(alpha=options.contrastive, top_k=top_k)
    if options.temperature:
        return Temperature(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    return Greedy()


def _flags() -> argparse.ArgumentParser:
    from palmjax import configure, distributed

    parser = argparse.ArgumentParser(
        prog="palmjax generate",
        description="Continue prompts with a checkpoint, on any mesh. No prompt is cut, however long; "
        "a note says so when prompt and continuation pass the length of training.",
        epilog=configure.USAGE
        + "\nexample: palmjax generate --checkpoint runs/first --prompt 'def ' --temperature 0.8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a checkpoint_N folder, or a MODEL_DIR: its newest")
    add("--prompt", action="append", metavar="TEXT", help="text to continue; repeatable")
    add("--prompt_file", action="append", metavar="FILE", help="a file with a prompt, taken as it is; - for stdin")
    add("--max_new_tokens", type=int, default=128, metavar="N", help="tokens a prompt at most (128)")
    add("--min_new_tokens", type=int, default=0, metavar="N", help="tokens before anything ends a text (0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a continuation before this text; repeatable")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the most probable token")
    add("--top_k", type=int, metavar="K", help="draw from the K most probable tokens; --contrastive: candidates (4)")
    add("--top_p", type=float, metavar="P", help="draw from the fewest tokens of total probability P")
    add("--beams", type=int, metavar="K", help="beam search with K beams")
    add(
        "--length_penalty",
        type=float,
        metavar="A",
        help="of --beams: log-probabilities are divided by length^A, as by Hugging Face (1)",
    )
    add(
        "--contrastive",
        type=float,
        metavar="ALPHA",
        help="contrastive search: ALPHA is how much a token like those before it loses (0.6 is usual)",
    )
    add("--seed", type=int, default=0, metavar="S", help="of the draws (0)")
    add("--rows", type=int, default=ROWS, metavar="B", help=f"prompts continued at a time ({ROWS})")
    add(
        "--json", action="store_true", help="a line of JSON a prompt: prompt, continuation, tokens, log_probs, finished"
    )
    distributed.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`palmjax generate --checkpoint DIR --prompt TEXT [...]`: prints each prompt with its continuation."""
    from palmjax import checkpoint, configure, distributed, model_dir, trained
    from palmjax.data import feed

    flags, rest = configure.parse_flags(sys.argv[1:] if argv is None else argv)
    options = _flags().parse_args(rest)
    texts, sampling = _read_prompts(options), _sampling(options)
    with distributed.session(options):
        path = model_dir.resolve(options.checkpoint)
        info = checkpoint.read_info(path)
        prompts = [_encode(info.vocabulary, text) for text in texts]
        bos = info.vocabulary.prompt_bos if all(prompts) else info.vocabulary.bos_id
        with trained.config_file(path, info) as file:
            experiment = configure.load([file, *flags.files], flags.bindings, flags.search_paths).experiment
        trained.enable_compilation_cache(experiment.train.compilation_cache)
        opened = trained.open_checkpoint(path, info, experiment)
        params = opened.params()
        began = time.perf_counter()
        found = generate(
            opened.model,
            params,
            prompts,
            options.max_new_tokens,
            sampling=sampling,
            min_new_tokens=options.min_new_tokens,
            seed=options.seed,
            bos=bos,
            stop=info.vocabulary.eos_id,
            stop_strings=options.stop,
            vocabulary=info.vocabulary,
            rows=options.rows,
            as_prefix="prefix" in experiment.train_dataset.packing.batch_fields,
            mesh=opened.mesh,
            rules=experiment.sharding,
        )
        if jax.process_index() == 0:
            seconds, trained_on = time.perf_counter() - began, feed.row_length(experiment.train_dataset)
            _print(texts, found, as_json=options.json)
            _print_notes(prompts, found, seconds, trained_on)
    return 0


def _print(texts: Sequence[str], found: Sequence[Continuation], *, as_json: bool) -> None:
    for number, (text, one) in enumerate(zip(texts, found, strict=True), 1):
        if as_json:
            record = {"prompt": text, "continuation": one.text, "tokens": one.tokens.tolist()}
            print(json.dumps({**record, "log_probs": one.log_probs.tolist(), "finished": one.finished}))
        else:
            if len(texts) > 1:
                print(f"--- prompt {number} of {len(texts)} ---")
            print(f"{text}{one.text}")
    sys.stdout.flush()


def _print_notes(
    prompts: Sequence[Sequence[int]], found: Sequence[Continuation], seconds: float, trained_on: int
) -> None:
    """On standard error: how fast it went, and which rows passed the length of training."""
    tokens = sum(len(one.tokens) for one in found)
    print(f"{tokens:,} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
    longest = max(1 + len(prompt) + len(one.tokens) for prompt, one in zip(prompts, found, strict=True))
    if longest > trained_on:
        print(
            f"note: {longest:,} tokens in a row, and the model was trained on rows of {trained_on:,}; nothing was cut, "
            "but text beyond that length may be poor",
            file=sys.stderr,
        )
