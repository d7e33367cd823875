"""`palmjax models`: every shipped model beside what its authors published, from its configuration alone."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import sys
from collections.abc import Sequence
from typing import Any

from palmjax.config import ConfigError
from palmjax.models.account import Account, account, leaves, padding
from palmjax.models.decoder import Decoder

NORMS_AND_POSITIONS = ("*_norm/scale", "*/content_bias", "*/position_bias", "*/rel_embedding")
"""What Gopher's and GLaM's totals are too coarse to show."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A published model.

    file: of gin/models. published: parameters as printed, to be read to as many digits as it has. length: tokens of a
    training row. active: published parameters that one token meets. apart: patterns of parameters that the published
    count leaves out. consistent: whether the source's total follows from its own sizes. note: what to know of the
    count.
    """

    name: str
    file: str
    published: float
    length: int
    active: float | None = None
    apart: tuple[str, ...] = ()
    consistent: bool = True
    note: str = ""


def _family(prefix: str, length: int, sizes: dict[str, float], **more: Any) -> tuple[Row, ...]:
    """Rows of one family; sizes: from "name=file" to the published parameters."""
    pairs = [(*key.split("="), published) for key, published in sizes.items()]
    return tuple(
        Row(name=f"{prefix} {name}".strip(), file=file, published=published, length=length, **more)
        for name, file, published in pairs
    )


def _glam(name: str, file: str, published: float, active: float, **more: Any) -> Row:
    apart = NORMS_AND_POSITIONS
    return Row(name=f"GLaM {name}", file=file, published=published, active=active, length=1024, apart=apart, **more)


ROWS: tuple[Row, ...] = (
    *_family("PaLM", 2048, {"8B=palm_8b": 8.63e9, "62B=palm_62b": 62.50e9, "540B=palm_540b": 540.35e9}),
    *_family(
        "GPT-2",
        1024,
        {"Small=gpt2_small": 117e6, "Medium=gpt2_medium": 345e6, "Large=gpt2_large": 762e6, "XL=gpt2_xl": 1.5e9},
        note="the paper's sizes are those of an earlier count; the released weights have this total",
    ),
    *_family("GPT-3", 2048, {"Small=gpt3_small": 125e6, "Medium=gpt3_medium": 356e6, "Large=gpt3_large": 760e6}),
    *_family(
        "GPT-3",
        2048,
        {"XL=gpt3_xl": 1.32e9},
        consistent=False,
        note="printed with 24 heads of 128 for a width of 2,048; 32 of 64 give the printed total",
    ),
    *_family("GPT-3", 2048, {"2.7B=gpt3_2_7b": 2.65e9, "6.7B=gpt3_6_7b": 6.66e9}),
    *_family(
        "GPT-3",
        2048,
        {"13B=gpt3_13b": 12.85e9},
        consistent=False,
        note="printed with a width of 5,140; 5,120 gives the printed total",
    ),
    *_family("GPT-3", 2048, {"175B=gpt3_175b": 174.6e9}),
    *_family(
        "Gopher",
        2048,
        {
            "44M=gopher_44m": 44e6,
            "117M=gopher_117m": 117e6,
            "417M=gopher_417m": 417e6,
            "1.4B=gopher_1_4b": 1.4e9,
            "7.1B=gopher_7_1b": 7.1e9,
            "280B=gopher_280b": 280e9,
        },
        apart=NORMS_AND_POSITIONS,
    ),
    *_family("Chinchilla", 2048, {"70B=chinchilla_70b": 70e9}, apart=NORMS_AND_POSITIONS),
    *_family("MT-NLG", 2048, {"530B=mt_nlg_530b": 530e9}),
    _glam("0.1B", "glam_0_1b", 130e6, 130e6, consistent=False, note="6 % above the printed total at V = 32,000"),
    _glam("0.1B/64E", "glam_0_1b_64e", 1.9e9, 145e6, consistent=False, note="5 % above the printed active parameters"),
    _glam("1.7B", "glam_1_7b", 1.7e9, 1.7e9),
    _glam(
        "1.7B/32E",
        "glam_1_7b_32e",
        20e9,
        1.878e9,
        consistent=False,
        note="the printed sizes give 13.96 B; the printed active parameters agree",
    ),
    _glam("1.7B/64E", "glam_1_7b_64e", 27e9, 1.879e9),
    _glam("1.7B/128E", "glam_1_7b_128e", 53e9, 1.881e9),
    _glam("1.7B/256E", "glam_1_7b_256e", 105e9, 1.886e9),
    _glam("8B", "glam_8b", 8.7e9, 8.7e9),
    _glam("8B/64E", "glam_8b_64e", 143e9, 9.8e9),
    Row(name="GLaM 137B", file="glam_137b", published=137e9, active=137e9, length=1024),
    _glam(
        "64B/64E",
        "glam_64b_64e",
        1.2e12,
        96.6e9,
        note="fits the paper's vocabulary of 256,000; the other rows fit 32,000",
    ),
    *_family(
        "OPT",
        2048,
        {
            "125M=opt_125m": 125e6,
            "350M=opt_350m": 350e6,
            "1.3B=opt_1_3b": 1.3e9,
            "2.7B=opt_2_7b": 2.7e9,
            "6.7B=opt_6_7b": 6.7e9,
            "13B=opt_13b": 13e9,
            "30B=opt_30b": 30e9,
            "66B=opt_66b": 66e9,
            "175B=opt_175b": 175e9,
        },
    ),
    *_family(
        "BLOOM",
        2048,
        {
            "560M=bloom_560m": 559e6,
            "1.1B=bloom_1_1b": 1.065e9,
            "1.7B=bloom_1_7b": 1.722e9,
            "3B=bloom_3b": 3.003e9,
            "7.1B=bloom_7_1b": 7.069e9,
            "176B=bloom_176b": 176.247e9,
        },
    ),
    *_family("Falcon", 2048, {"7B=falcon_7b": 7e9, "40B=falcon_40b": 40e9}),
    *_family(
        "Falcon",
        2048,
        {"180B=falcon_180b": 179_522_565_120},
        note="the published count stores the tied head apart: 965,476,352 more",
    ),
    *_family(
        "GPT-J",
        2048,
        {"6B=gpt_j_6b": 6_053_381_344},
        note="the published count has eight shards' copies of norms and output biases, and a bias of the embedding",
    ),
    *_family("GPT-NeoX", 2048, {"20B=gpt_neox_20b": 20e9}),
    *_family(
        "LLaMA",
        2048,
        {"7B=llama_7b": 6.7e9, "13B=llama_13b": 13.0e9, "33B=llama_33b": 32.5e9, "65B=llama_65b": 65.2e9},
    ),
    *_family("LLaMA 2", 4096, {"7B=llama2_7b": 6.7e9, "13B=llama2_13b": 13.0e9}),
    *_family(
        "LLaMA 2",
        4096,
        {"70B=llama2_70b": 68_976_653_312},
        note="the published count has 5,120 stored rotary frequencies",
    ),
    *_family("Mistral", 8192, {"7B=mistral_7b": 7.24e9}),
    *_family(
        "BERT",
        512,
        {"Base=bert_base": 110e6, "Large=bert_large": 340e6},
        apart=("decoder/logits_dense/norm/*", "decoder/logits_dense/bias"),
        note="counted with the pooler, which is as large as the masked-LM head's dense layer that stands here",
    ),
)
"""Published sizes as the papers and model cards print them; GPT-3's from appendix D where it has more digits."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row with its model's account. counted: parameters as the source counts them (without `Row.apart`)."""

    row: Row
    cost: Account
    counted: int
    optimal_tokens: float | None

    @property
    def difference(self) -> float:
        """Of `counted` from the published total, relative."""
        return self.counted / self.row.published - 1.0

    def record(self) -> dict[str, Any]:
        """The entry as JSON takes it."""
        return {
            "name": self.row.name,
            "file": f"models/{self.row.file}.gin",
            "published": self.row.published,
            "published_active": self.row.active,
            "counted": self.counted,
            "difference": self.difference,
            "consistent": self.row.consistent,
            "note": self.row.note,
            "length": self.row.length,
            "optimal_tokens": self.optimal_tokens,
            **dataclasses.asdict(self.cost),
        }


def optimal_tokens(parameters: float) -> float:
    """Training tokens at which a dense model of this size is compute-optimal (Hoffmann et al. 2022, approach 1).

    The power law through their table 3, N = 0.0993487 C^0.49809 with C = 6 N D; the table's row of 67 B, which is
    rounded by hand, is left out.
    """
    flops = (parameters / 0.0993487) ** (1.0 / 0.49809)
    return flops / (6.0 * parameters)


def entry(row: Row, model: Any) -> Entry:
    """The entry of a row whose file configures `model`. Raises ConfigError unless it is a Decoder."""
    if not isinstance(model, Decoder):
        raise ConfigError(f"models/{row.file}.gin: MODEL is a {type(model).__name__}; only a Decoder can be counted")
    every, cost = leaves(model), account(model, row.length)
    apart = [leaf for leaf in every if any(fnmatch.fnmatchcase(leaf.name, pattern) for pattern in row.apart)]
    counted = cost.parameters - sum(leaf.size - padding(model, leaf) for leaf in apart)
    is_dense_lm = cost.active_parameters == cost.parameters and model.attention.causal
    return Entry(row, cost, counted, optimal_tokens(counted) if is_dense_lm else None)


def _number(value: float | None) -> str:
    """Three to five significant digits with a unit."""
    if value is None:
        return "-"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.5g} {unit}"
    return f"{value:.5g}"


def table(entries: Sequence[Entry]) -> str:
    """The entries as text: a line each, marks for rows whose source contradicts itself, and the notes."""
    notes: list[str] = []
    head = ("model", "published", "parameters", "differs", "KV B/token", "FLOPs/token", "optimal tokens", "")
    lines: list[tuple[str, ...]] = [head]
    for one in entries:
        mark = "" if one.row.consistent else "inconsistent "
        if one.row.note:
            notes = notes if one.row.note in notes else [*notes, one.row.note]
            mark += f"[{notes.index(one.row.note) + 1}]"
        lines.append(
            (
                one.row.name,
                _number(one.row.published),
                f"{one.counted:,}",
                f"{one.difference:+.2%}",
                f"{one.cost.kv_bytes_per_token:,}",
                f"{one.cost.flops_per_token:.4g}",
                _number(one.optimal_tokens),
                mark,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(cell.ljust(width) if i in (0, 7) else cell.rjust(width) for i, (cell, width) in columns).rstrip()
        for columns in (enumerate(zip(line, widths, strict=True)) for line in lines)
    ]
    text += ["", *(f"[{number}] {note}" for number, note in enumerate(notes, 1))]
    text += [
        "parameters: counted as the source counts; Gopher, Chinchilla and GLaM without norm scales and position biases",
        "FLOPs/token: of training, 6 N + 12 L H Q T at training's row length; experts: of active parameters",
        "optimal tokens: Hoffmann et al. 2022, approach 1 (dense language models)",
    ]
    return "\n".join(text) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """`palmjax models [NAME ...] [--json]`: prints the table, or a line of JSON a model."""
    from palmjax import configure

    parser = argparse.ArgumentParser(
        prog="palmjax models",
        description="Every shipped model beside what its authors published. Nothing is computed on a device.",
        epilog="To train one: palmjax train models/NAME.gin with files for run, optim and data, as gin/exp/ shows.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a model's name or file, such as llama")
    parser.add_argument("--json", action="store_true", help="a line of JSON a model")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    rows = [
        row
        for row in ROWS
        if not options.names or any(n.lower() in f"{row.name} {row.file}".lower() for n in options.names)
    ]
    if not rows:
        raise ConfigError(f"no shipped model is named like {' or '.join(options.names)}; palmjax models lists all")
    entries = [entry(row, configure.load_model([f"models/{row.file}.gin"])) for row in rows]
    if options.json:
        for one in entries:
            print(json.dumps(one.record()))
    else:
        print(table(entries), end="")
    return 0


if __name__ == "__main__":
    from palmjax.cli import run_main

    raise SystemExit(run_main(main))
