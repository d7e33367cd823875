"""The README of the kernels, executed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp

README = (Path(__file__).parents[2] / "pallas_kernels" / "README.md").read_text()


def test_its_examples_run_and_say_what_it_says() -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    assert names["out"].shape == names["q"].shape
    assert names["new"].shape == (1, 1, 16, 256)
    assert names["loss"].shape == (8,)
    for result in ("out", "new", "loss", "total"):
        assert jnp.all(jnp.isfinite(names[result])), result
    told = re.findall(r"^(explain\(.*?\))\n# (.*?) for q", README, re.MULTILINE)
    assert len(told) == 2
    for call, said in told:
        assert eval(call, names).startswith(said)
