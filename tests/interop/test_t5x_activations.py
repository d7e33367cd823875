"""Activations of a T5X network: its tree does not tell them, its run's config.gin does."""

from __future__ import annotations

from typing import Any

import pytest

from palmjax import cli
from palmjax.interop import convert
from palmjax.models.layers import GEGLU, ReLU, SwiGLU
from tests.interop import models
from tests.interop.test_t5x import HIDDEN, decoder_only, read_by_hand, write_legacy


@pytest.mark.parametrize(
    ("bindings", "wanted"),
    [
        ("network.TransformerConfig.mlp_activations = ('gelu', 'linear')\n", GEGLU(d_ff=HIDDEN)),
        ("network.TransformerConfig.mlp_activations = \\\n    ['swish', 'linear']\n", SwiGLU(d_ff=HIDDEN)),
        ("network.TransformerConfig.mlp_activations = ('relu', 'linear')\n", SwiGLU(d_ff=HIDDEN, activation=ReLU())),
        ("network.TransformerConfig.mlp_activations = ('gelu',)\n", "('gelu',)"),
        ("network.TransformerConfig.mlp_activations = ('tanh', 'linear')\n", "tanh"),
    ],
)
def test_the_runs_config_tells_the_activations_that_a_tree_does_not(tmp_path, capfd, bindings, wanted):
    tree = decoder_only()
    write_legacy(tmp_path / "run", tree, {})
    (tmp_path / "run" / "config.gin").write_text(f"# Parameters for network.TransformerConfig:\n{bindings}")
    code = cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "ours")])
    said = capfd.readouterr().err
    if isinstance(wanted, str):
        assert code == 2 and wanted in said and "MODEL.gin" in said and not (tmp_path / "ours").exists()
        return
    assert code == 0 and "does not tell" not in said
    block: Any = models.restored(tmp_path / "ours")[0].config.block
    assert block.mlp == wanted
    convert.to_t5x(str(tmp_path / "ours"), tmp_path / "back")
    found, _, _ = read_by_hand(tmp_path / "back" / "checkpoint_60")
    assert found.keys() == tree.keys()


def test_what_is_taken_for_granted_is_said(tmp_path, capfd):
    write_legacy(tmp_path / "run", decoder_only(), {})
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "ours")]) == 0
    said = capfd.readouterr().err
    assert "TanhGELU gates as is usual" in said and "no text: --vocabulary FILE gives one" in said
    (tmp_path / "run" / "config.gin").write_text(
        "network.TransformerConfig.mlp_activations = ('gelu', 'linear')\n"
        "seqio.SentencePieceVocabulary.sentencepiece_model_file = \\\n    'gs://t5-data/vocabs/cc_all.32000/sentencepiece.model'\n"
    )
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    assert "its run had --vocabulary gs://t5-data/vocabs/cc_all.32000/sentencepiece.model" in capfd.readouterr().err
