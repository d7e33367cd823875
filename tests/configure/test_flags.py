"""T5X's command line, and where gin files are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from palmjax import configure
from palmjax.config import ConfigError
from palmjax.configure import Flags, parse_flags
from palmjax.configure.text import Reader


def test_t5x_spelling() -> None:
    files, settings = "--gin_file=a.gin b.gin --gin_file c.gin", "--gin.MODEL_DIR=/x --gin_bindings=A=1"
    flags, rest = parse_flags(f"{files} {settings} --gin_search_paths=p,q --verbose 3".split())
    assert flags == Flags(("a.gin", "b.gin", "c.gin"), ("MODEL_DIR=/x", "A=1"), ("p", "q"))
    assert rest == ["--verbose", "3"]


def test_a_flags_value_is_not_a_gin_file() -> None:
    flags, rest = parse_flags(["--output", "resolved.gin", "exp.gin", "--", "other.gin", "--gin.X=1"])
    assert flags == Flags(("exp.gin",))
    assert rest == ["--output", "resolved.gin", "--", "other.gin", "--gin.X=1"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--gin_fle=a.gin", "unknown flag --gin_fle; "),
        ("--gin.MODEL_DIR", "--gin.MODEL_DIR needs a value"),
        ("--gin_file", "--gin_file needs a value"),
    ],
)
def test_wrong_flags(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_flags([argument])


def test_files_are_looked_for_here_then_in_the_search_paths_then_among_the_shipped(tmp_path: Path, monkeypatch) -> None:
    here, first, second = (tmp_path / name for name in ("here", "first", "second"))
    for folder in (here, first, second):
        (folder / "run").mkdir(parents=True)
    monkeypatch.chdir(here)

    def found(name: str) -> str:
        reader = Reader([str(first), str(second)])
        reader.file(name)
        return reader.source.files[0][1]

    shipped = found("run/train.gin")
    assert shipped.endswith("gin/run/train.gin")
    assert found("gin/run/train.gin") == shipped
    for folder in (second, first, here):
        (folder / "run" / "train.gin").write_text("")
        assert Path(here, found("run/train.gin")).resolve() == folder / "run" / "train.gin"
    assert found(str(second / "run" / "train.gin")) == str(second / "run" / "train.gin")


def test_the_verb_prints_each_format(capsys) -> None:
    argv = ["exp/palm_stdlib.gin", "--gin.TRAIN_STEPS=7"]
    assert configure.main(argv) == 0
    assert "TRAIN_STEPS --gin.TRAIN_STEPS  (overrides " in capsys.readouterr().out
    assert configure.main([*argv, "--format=gin"]) == 0
    assert "\nTRAIN_STEPS = 7\n" in capsys.readouterr().out
    assert configure.main([*argv, "--format=flat"]) == 0
    assert "\ntrain.steps = 7\n" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no gin file"):
        configure.main([])
