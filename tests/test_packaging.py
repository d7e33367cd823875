"""The built wheel, installed in an empty environment, far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"palmjax", "tasks", "pallas_kernels", "launch"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True)
    (built,) = folder.glob("palmjax-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel in it. Its dependencies are read from this one: they are not what is tested."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    install = ["uv", "pip", "install", "--quiet", "--offline", "--no-deps", "--python", str(python), str(wheel)]
    subprocess.run([sys.executable, "-m", *install], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")}))
    # A folder named in a .pth file is searched last, and the .pth files in it (the editable install's) have no effect.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(installed: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    program = installed / "venv" / "bin" / command[0]
    done = subprocess.run(
        [program, *command[1:]],
        cwd=installed,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_packages_and_the_configs(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == PACKAGES
    for package in PACKAGES:
        held = {name for name in names if name.startswith(package + "/") and name.endswith(".py")}
        assert held == {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
    configs = {name.removeprefix("palmjax/_data/") for name in names if name.startswith("palmjax/_data/")}
    assert configs == {str(path.relative_to(ROOT)) for path in (ROOT / "gin").rglob("*.gin")}
    assert "gin/exp/palm_stdlib.gin" in configs


def test_the_installed_package_finds_its_configs_from_anywhere(installed: Path) -> None:
    where = run(installed, "python", "-c", "import palmjax, gin; print(palmjax.__file__); print(gin.__file__)").split()
    assert Path(where[0]).is_relative_to(installed)
    assert where[1].endswith("site-packages/gin/__init__.py")
    for name in ("exp/palm_stdlib.gin", "gin/exp/palm_stdlib.gin"):
        tree = run(installed, "palmjax", "config", name, "--gin.MODEL_DIR=/tmp/run")
        assert (installed / tree.splitlines()[0]).is_relative_to(installed / "venv")
        assert "model_dir" in tree
    with_checkout = subprocess.run(
        [sys.executable, "-m", "palmjax", "config", "exp/palm_stdlib.gin", "--gin.MODEL_DIR=/tmp/run", "--format=flat"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    flat = run(installed, "palmjax", "config", "exp/palm_stdlib.gin", "--gin.MODEL_DIR=/tmp/run", "--format=flat")
    assert flat == with_checkout.stdout


def test_the_version_is_said_once(installed: Path) -> None:
    script = "import palmjax, importlib.metadata as m; assert m.version('palmjax') == palmjax.__version__"
    run(installed, "python", "-c", script)
    assert run(installed, "palmjax", "--version").startswith("palmjax ")


RUNTIME = {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "seqio", "matplotlib", "uv"}
FOR_TESTS = {"pytest", "ruff", "pyright", "libtpu", "transformers", "safetensors", "tokenizers"}


@pytest.mark.parametrize(
    "name, wanted", [("requirements.lock", RUNTIME), ("requirements-dev.lock", RUNTIME | FOR_TESTS)]
)
def test_the_lock_is_exact_and_names_no_index(name: str, wanted: set[str]) -> None:
    lines = (ROOT / name).read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith((" ", "#"))]
    assert all("==" in line for line in pins)
    assert len(pins) > 50
    assert not [line for line in lines if "://" in line or "--index" in line or "-index-url" in line]
    locked = {line.split("==")[0].lower() for line in pins}
    assert wanted <= locked


def test_what_the_two_locks_share_has_one_version() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = (ROOT / name).read_text().splitlines()
        return dict(
            line.split(" ")[0].split("==") for line in lines if "==" in line and not line.startswith((" ", "#"))
        )

    both = pins("requirements.lock"), pins("requirements-dev.lock")
    assert {name: version for name, version in both[1].items() if name in both[0]} == both[0]
