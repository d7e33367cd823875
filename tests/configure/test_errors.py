"""Every mistake is one or two lines that name the place, what is wrong, and the nearest right thing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from palmjax import configure
from palmjax.config import ConfigError

ENTRIES = (Path(__file__).parent / "mistakes.txt").read_text().strip().split("\n\n")
"""Each entry: a name after `# `, the gin text that follows an include of the base file, and how the error begins."""


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.partition("\n")[0].removeprefix("# "))
def test_mistakes(load, entry: str) -> None:
    text, _, message = entry.partition("\n")[2].partition("\n=> ")
    with pytest.raises(ConfigError) as raised:
        load(text)
    assert str(raised.value).startswith(message)
    assert str(raised.value).count("\n") <= 1


def test_everything_that_is_not_set_is_said_at_once(load) -> None:
    with pytest.raises(ConfigError) as raised:
        load(required=False)
    first, second = str(raised.value).split("\n")
    steps = "TRAIN_STEPS (TrainConfig.steps at base.gin:4, int)"
    assert first == f"not set: MODEL_DIR (Experiment.model_dir at base.gin:3, str); {steps}"
    assert second == "  for example: --gin.MODEL_DIR=/tmp/run --gin.TRAIN_STEPS=100"


def test_a_field_without_binding_or_default_is_not_set(load) -> None:
    with pytest.raises(ConfigError, match=r"^not set: train/Lines.name \(str\)"):
        load("train/DatasetConfig.tasks = (@Lines(),)")


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("TRAIN_STEP=3", "macro TRAIN_STEP is never used; nearest: TRAIN_STEPS"),
        ("TRAIN_STEPS=1O0", "TrainConfig.steps = %TRAIN_STEPS = '1O0': expected int, got str '1O0'"),
        ("TRAIN_STEPS=-5", "TrainConfig.steps = -5: must be 1 or more"),
        ("MODEL_DIR=12", "Experiment.model_dir = %MODEL_DIR = 12: expected str, got int 12 (quote it)"),
        ("MODEL_DIR=a b", "cannot read 'MODEL_DIR=a b' as gin; quote a string"),
        ("TrainConfig.tensorboard=no", "TrainConfig.tensorboard = 'no': expected bool, got str 'no'"),
        ("Toy.layers={1", "cannot read 'Toy.layers={1' as gin"),
    ],
)
def test_the_command_line_is_named_as_the_place(load, binding: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load("", binding)
    assert str(raised.value).startswith(f"--gin.{binding.partition('=')[0]}: {message}")


@pytest.fixture
def twins(tmp_path, monkeypatch) -> None:
    """Modules `twin_one` and `twin_two` with a class of the same name, which is also one of palmjax's: RoPE."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("twin_one", "twin_two"):
        monkeypatch.delitem(sys.modules, module, raising=False)
        classes = "".join(f"@section\nclass {name}:\n    x: int = 1\n" for name in ("Twin", "RoPE"))
        (tmp_path / f"{module}.py").write_text(f"from palmjax.config import section\n{classes}")


def test_an_ambiguous_name_names_both_whatever_was_named_before(load, twins) -> None:
    imports = "import twin_one\nimport twin_two\n"
    for first in ("", "Experiment.model = @twin_one.Twin()\n"):
        with pytest.raises(ConfigError, match=r"'Twin' is ambiguous: write twin_one.Twin or twin_two.Twin"):
            load(f"{imports}{first}Twin.x = 1")


def test_palmjax_comes_before_a_users_class_of_the_same_name(load, twins) -> None:
    with pytest.raises(ConfigError, match="RoPE has no field 'x'"):
        load("import twin_one\nExperiment.model = @twin_one.RoPE()\nRoPE.x = 1")
    with pytest.raises(ConfigError, match="expected ModelPart, got RoPE"):
        load("import twin_one\nExperiment.model = @twin_one.RoPE()\ntwin_one.RoPE.x = 2")


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("Attention.num_heads=0", "Attention.num_heads = 0: must be 1 or more"),
        ("Attention.num_kv_heads=0", "Attention.num_kv_heads = 0: must be 1 or more"),
        ("Attention.head_dim=0", "Attention.head_dim = 0: must be 1 or more"),
        ("Attention.window=0", "Attention.window = 0: must be 1 or more, or None for all keys"),
        ("Attention.impl='flash'", "Attention.impl = 'flash': attention: unknown implementation 'flash'; there is"),
        ("SwiGLU.d_ff=0", "SwiGLU.d_ff = 0: must be 1 or more"),
        ("RANDOM_SEED=100000000000000000000000", "DatasetConfig.seed = 100000000000000000000000: must be from 0 to"),
    ],
)
def test_a_bound_of_a_shipped_experiment_names_the_place(binding: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        configure.load(["exp/palm_stdlib.gin"], [binding])
    assert str(raised.value).startswith(f"--gin.{binding.partition('=')[0]}: {message}")
    assert "\n" not in str(raised.value)


def test_the_outermost_values_of_every_bound_are_accepted() -> None:
    bindings = ["SaveCheckpointConfig.keep=None", "RANDOM_SEED=4294967295", "TRAIN_STEPS=1", "EVAL_STEPS=1"]
    bindings += ["TrainConfig.profile_steps=(3, 3)", "Attention.window=1", "Attention.impl='xla'", "SwiGLU.d_ff=1"]
    assert configure.load(["exp/palm_stdlib.gin"], bindings).experiment.train.seed == 2**32 - 1


def test_a_file_that_is_not_text(tmp_path) -> None:
    (tmp_path / "x.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not a text file"):
        configure.load([str(tmp_path / "x.gin")])
