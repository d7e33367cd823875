"""Tuning for TPUs without one: what is chosen of made-up costs, and what is written."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from pallas_kernels import aot, tune
from pallas_kernels.attention import table
from pallas_kernels.attention.table import Shape
from pallas_kernels.attention.tpu_plan import Blocks
from pallas_kernels.decode_attention import choice as decode_choice
from pallas_kernels.linear_cross_entropy import choice as loss_choice
from pallas_kernels.linear_cross_entropy.tpu import NAMES, Tiles

REFUSED = aot.CompileError("too large")


@pytest.fixture
def compiler(monkeypatch):
    """Costs by what is asked; `refused` says what does not compile with what takes most memory."""

    class Compiler:
        def __init__(self) -> None:
            self.cost: Any = None
            self.refused: Any = lambda arguments: False

        def costs(self, chip: str, questions: Any) -> list[Any]:
            return [(self.cost(question.arguments), "bundles") for question in questions]

        def listings(self, chip: str, questions: Any) -> Any:
            return iter([REFUSED if self.refused(question.arguments) else {} for question in questions])

    made = Compiler()
    monkeypatch.setattr(aot, "costs", made.costs)
    monkeypatch.setattr(aot, "listings", made.listings)
    return made


def test_the_cheapest_that_fits_is_taken_or_one_before_it_that_is_as_good(compiler):
    def choose(*found: Any, refused: str = "") -> Any:
        compiler.refused = lambda arguments: arguments["candidate"] in refused
        return tune.choose("x", "TPU v4", "abcde"[: len(found)], found, lambda x: tune.compiled("", candidate=x))

    found = [(920, "bundles"), (910, "bundles"), REFUSED, (900, "bundles"), (880, "bundles")]
    assert choose(*found) == ("e", 880, "bundles")
    assert choose(*found, refused="e") == ("b", 910, "bundles")
    assert choose(*found, refused="be") == ("d", 900, "bundles")
    untold = [(5, "simulated"), REFUSED, aot.ProfileError("aborted")]
    assert choose(*untold) == ("a", None, "compiled")
    assert choose(*untold, refused="a") == ("c", None, "compiled")
    with pytest.raises(ValueError, match="no candidate of x compiles with what takes most memory: too large"):
        choose(REFUSED)


def test_attention_takes_each_pass_s_best_that_compiles_and_the_first_row_s_where_as_good(compiler, monkeypatch):
    def blocks(arguments: dict[str, Any]) -> dict[str, Any]:
        return arguments["tuning"][arguments["which"]]

    def cost(arguments: dict[str, Any]) -> int:
        best = {"causal": (1024, 512), "window": (2048, 256)}.get(arguments["shape"]["mask"])
        mine = blocks(arguments)
        return 1000 if (mine["rows"], mine["keys"]) == best else 1015 if mine["keys"] == 512 else 2000

    compiler.cost = cost
    compiler.refused = lambda arguments: arguments["which"] == "backward" and blocks(arguments)["rows"] == 1024
    shapes = [Shape(length=2048, heads=16, head_dim=256, dtype="bfloat16", mask=mask) for mask in ("causal", "window")]
    monkeypatch.setattr(tune, "SHAPES", shapes)
    rows = [
        table.Row(**{**entry, "tuning": table.as_tuning(entry["tuning"])})
        for entry in json.loads(json.dumps(list(tune.attention_rows("TPU v4", at_hand=False))))
    ]
    assert [row.shape for row in rows] == shapes
    causal, window = rows
    assert causal.tuning.forward == Blocks(rows=2048, keys=512, cores=2), "in its place among what is as good"
    assert causal.tuning.backward == Blocks(rows=512, keys=512, cores=2) and causal.tuning.forward_keys == 2048
    assert window.tuning.forward == causal.tuning.forward
    assert (window.forward_cost, window.source, window.backward_cost) == (1015, "bundles", 1015)
    assert set(window.provenance) == {"jax", "libtpu", "date"}
    compiler.refused = lambda arguments: True
    with pytest.raises(ValueError, match=r"no candidate of TPU v4 causal .* compiles with what"):
        tune.attention_row("TPU v4", shapes[0], at_hand=False)


def test_the_loss_takes_each_kernel_s_best_of_one_height_of_tiles(compiler):
    def cost(arguments: dict[str, Any]) -> dict[str, int]:
        tiles = Tiles(**arguments["tiles"])
        taken = (tiles.rows + abs(tiles.width - 2048), abs(tiles.hidden_width - 512), abs(tiles.table_rows - 512))
        return {name: 1000 + value for name, value in zip(NAMES, taken, strict=True)}

    compiler.cost = cost
    row = tune.loss_row("TPU v4", at_hand=False)
    tiles = Tiles(**row["tiles"])
    assert (tiles.rows, tiles.width, tiles.hidden_width, tiles.table_rows) == (256, 2048, 512, 512)
    assert row["cost"] == dict(zip(NAMES, (1256, 1000, 1000), strict=True))
    compiler.refused = lambda arguments: arguments["tiles"]["rows"] == 256
    assert tune.loss_row("TPU v4", at_hand=False)["tiles"]["rows"] == 512


def test_each_op_s_table_is_written_and_read(compiler, monkeypatch, tmp_path, capsys):
    compiler.cost = lambda arguments: dict.fromkeys(NAMES, 7) if "tiles" in arguments else 7
    monkeypatch.setattr(tune, "SHAPES", tune.SHAPES[:1])
    for module in (table, decode_choice, loss_choice):
        folder = tmp_path / module.__name__
        folder.mkdir()
        monkeypatch.setattr(module, "FOLDER", folder)
        module.rows.cache_clear()
    try:
        tune.main(["--chip", "TPU v5"])
        for module in (table, decode_choice, loss_choice):
            module.rows.cache_clear()
            assert {row.chip for row in module.rows()} == {"TPU v5"}
            assert all(set(row.provenance) == {"jax", "libtpu", "date"} for row in module.rows())
        tune.main(["--chip", "TPU v4", "--op", "decode_attention"])
    finally:
        for module in (table, decode_choice, loss_choice):
            module.rows.cache_clear()
    names = {path.name for path in tmp_path.rglob("*.json")}
    assert names == {"tpu_v5.json", "tpu_v4.json"} and len(list(tmp_path.rglob("tpu_v4.json"))) == 1


def test_a_chip_at_hand_is_timed(monkeypatch):
    """Interpreted: all of a candidate's program runs, parts and all."""
    monkeypatch.setattr(tune.tune_gpu, "seconds", lambda call, setting: 2e-6 if call() is not None else 0.0)
    shape = Shape(length=300, heads=2, head_dim=128, dtype="float32", mask="packed")
    blocks = Blocks(rows=128, keys=128)
    tuning = dataclasses.replace(tune.tuning_of("TPU v4", shape, blocks), forward_keys=150)
    question = tune.cost.question("TPU v4", "forward", shape, tuning)
    assert tune.timed("TPU v4", question, interpret=True) == (2, "measured")
