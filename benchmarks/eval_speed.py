"""Requests a second of `palmjax lm-eval` and of lm-eval's own `hf`, equal weights. `python -m benchmarks.eval_speed`

A random LLaMA of 4 layers, width 256, float32, made by transformers and converted. Suites, in local files:
- shots drawn: multiple choice of four, 5-shot prompts whose shots lm-eval draws anew for each document.
- shots fixed: the same with the first five documents as shots of all, as MMLU has them.
- nothing shared: log-likelihood of the last words of texts.
What is timed is the model's `loglikelihood` on all requests of a suite, tokenizing included; the two take turns, and
the best of the turns counts. Both get the same cores, one by default: torch's threads spin while they wait for a core
that another process has. Other work on the machine takes wall time from both, so the ratio of CPU seconds is printed
beside it. Ours compiles in its first call, without a cache of compiled programs; the seconds are printed apart.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}

from tests.interop.lm_eval_tasks import sentence, write_model, write_task

LENGTH = 512


def write_suites(folder: Path, documents: int) -> dict[str, str]:
    """Suite to its task."""
    rng = random.Random(2)
    asked = [
        {
            "question": sentence(rng, rng.randint(20, 40)),
            "choices": [sentence(rng, rng.randint(3, 8)) for _ in range(4)],
            "answer": rng.randrange(4),
        }
        for _ in range(documents)
    ]
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
        "num_fewshot": 5,
    }
    write_task(folder, "drawn", asked, choice)
    write_task(folder, "fixed", asked, choice | {"fewshot_config": {"sampler": "first_n"}})
    lengths = [rng.randint(20, 60) for _ in range(4 * documents)]
    pairs = [{"begin": sentence(rng, n), "end": " " + sentence(rng, rng.randint(1, 5))} for n in lengths]
    last = {"doc_to_text": "{{begin}}", "doc_to_target": "{{end}}", "metric_list": [{"metric": "acc"}]}
    write_task(folder, "alone", pairs, last | {"output_type": "loglikelihood"})
    return {"shots drawn": "drawn", "shots fixed": "fixed", "nothing shared": "alone"}


class Timed:
    """Wall and CPU seconds, and requests, of a model's `loglikelihood` in each run."""

    def __init__(self, lm: Any, folder: Path):
        from lm_eval.tasks import TaskManager

        self.lm, self._manager = lm, TaskManager(include_path=str(folder), include_defaults=False)
        self._plain, lm.loglikelihood = lm.loglikelihood, self._timed
        self.wall = self.cpu = 0.0
        self.requests = 0

    def _timed(self, requests: Any, *given: Any, **named: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        found = self._plain(requests, *given, **named)
        self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.requests = len(requests)
        return found

    def run(self, task: str) -> list[float]:
        """The log-likelihoods."""
        import lm_eval

        with contextlib.redirect_stderr(io.StringIO()):
            evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its parameters
            found = evaluate(
                model=self.lm, tasks=[task], task_manager=self._manager, bootstrap_iters=0, verbosity="ERROR"
            )
        return [answer[0][0] for sample in found["samples"][task] for answer in sample["resps"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[1024, 32000])
    parser.add_argument("--hf_batch_size", type=int, default=16)
    parser.add_argument("--cores", type=int, default=1)
    options = parser.parse_args()
    # Before jax and torch start their threads, as many as there are cores to run on.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.cores :])
    logging.disable(logging.WARNING)
    for vocabulary in options.vocabulary:
        compare(vocabulary, options)


def compare(vocabulary: int, options: argparse.Namespace) -> None:
    """One vocabulary size: prints a line for each suite."""
    import torch
    from lm_eval.models import huggingface

    from palmjax.interop import convert
    from palmjax.interop import lm_eval as backend

    torch.set_num_threads(options.cores)
    with tempfile.TemporaryDirectory(prefix="palmjax-") as place, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(place)
        (folder / "tasks").mkdir()
        suites = write_suites(folder / "tasks", options.documents)
        weights = {"layers": 4, "width": 256, "length": LENGTH, "rows": vocabulary}
        source = write_model(folder / "hf", "llama", **weights)
        convert.from_huggingface(source, folder / "ours", ['Decoder.dtype = "float32"'])
        ours = Timed(backend.load(str(folder / "ours")), folder / "tasks")
        wrapped: Any = huggingface
        theirs = wrapped.HFLM(pretrained=str(source), dtype="float32", batch_size=options.hf_batch_size, device="cpu")
        hf = Timed(theirs, folder / "tasks")
        first = dict[str, float]()
        for task in suites.values():
            ours.run(task)
            first[task] = ours.cpu
        for suite, task in suites.items():
            best = {}
            for _ in range(options.repeats):
                answers = {}
                for name, timed in (("palmjax", ours), ("hf", hf)):
                    answers[name] = timed.run(task)
                    now = (timed.wall, timed.cpu)
                    best[name] = tuple(map(min, zip(best.get(name, now), now, strict=True)))
            most = max(abs(a - b) for a, b in zip(answers["palmjax"], answers["hf"], strict=True))
            rate = {name: ours.requests / wall for name, (wall, _) in best.items()}
            cpu = best["hf"][1] / best["palmjax"][1]
            print(
                f"vocabulary {vocabulary:6,}  {suite:15}  {ours.requests:4} requests  "
                f"palmjax {rate['palmjax']:6.1f}/s  hf {rate['hf']:6.1f}/s  ratio {rate['palmjax'] / rate['hf']:.2f}  "
                f"of CPU seconds {cpu:.2f}  first call +{max(0.0, first[task] - best['palmjax'][1]):.1f} CPU s  "
                f"largest difference {most:.1e} nats",
                flush=True,
            )


if __name__ == "__main__":
    main()
