"""The wheel, outside the source tree; the source archive; the Makefile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from sedac_hf import __version__

ROOT = Path(__file__).resolve().parent.parent


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command, show what it said when it fails, and return its standard output."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as `pip install .` builds it."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "maturin", "build", "--release", "--locked", "--out", out)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def outside(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("outside") / "venv"
    venv.create(folder, with_pip=False)
    (site,) = (folder / "lib").glob("python*/site-packages")
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # Only the folders themselves: an editable install of ours is not followed from there.
    (site / "dependencies.pth").write_text("\n".join(seen))
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel)
    return folder


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert re.fullmatch(rf"sedac_hf-{re.escape(__version__)}-cp310-abi3-.+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_name).decode())
    assert {name.split("/")[0] for name in names} == {
        "sedac_hf",
        f"sedac_hf-{__version__}.dist-info",
    }
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "sedac_hf")
    missing = {name for name in tracked.split() if (ROOT / name).is_file()} - names
    assert not missing
    assert any(name.startswith("sedac_hf/_core.") for name in names)
    assert metadata["Name"] == "sedac-hf"
    assert metadata["License-Expression"] == "Apache-2.0"
    required = {str(r).split(";")[0].split(">")[0] for r in metadata.get_all("Requires-Dist")}
    assert {"torch", "transformers", "safetensors", "typer"} <= required


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder(outside: Path, tmp_path: Path) -> None:
    python = outside / "bin" / "python"
    code = (
        "import numpy as np, sedac_hf\n"
        "from pathlib import Path\n"
        "from sedac_hf import _core, SedacForCausalLM, SedacConfig, fit, evaluate\n"
        "one = np.ones(3, np.float32)\n"
        "print(_core.batch_confidence_accumulate(one, 0 * one, 1.0, 1.0, 0.5).tolist())\n"
        "print(Path(sedac_hf.__file__).parent)\n"
        "print(Path(_core.__file__).parent)"
    )
    values, package, core = run(python, "-c", code, cwd=tmp_path).split("\n")[:3]
    assert values == "[1.5, 1.5, 1.5]"
    assert Path(package).is_relative_to(outside)
    assert core == package
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_installed_command_runs(outside: Path, tmp_path: Path) -> None:
    sedac = outside / "bin" / "sedac"
    assert run(sedac, "--version", cwd=tmp_path).strip() == f"sedac_hf {__version__}"
    assert '"sedac_hf"' in run(sedac, "info", "--json", cwd=tmp_path)


@pytest.mark.slow
def test_the_source_archive_can_be_built_from(tmp_path: Path) -> None:
    run(sys.executable, "-m", "maturin", "sdist", "--out", tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.split("/", 1)[1] for name in content.getnames() if "/" in name}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert {"rust_core/Cargo.toml", "rust_core/src/lib.rs"} <= names
    assert {"sedac_hf/__init__.py", "sedac_hf/evaluation/prompts/grounded.jsonl"} <= names
    assert not any(name.startswith((".models", ".venv", "tests/__pycache__")) for name in names)


def test_make_describes_its_targets() -> None:
    make = shutil.which("make")
    assert make is not None
    text = run(make, "help")
    for target in ("setup", "demo", "test", "lint", "bench"):
        assert re.search(rf"^  make {target} +\S", text, re.MULTILINE), target
    assert "TORCH_INDEX" in text


def test_ci_is_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("make --no-print-directory test")
    plan = run(shutil.which("make") or "make", "-n", "test")
    assert plan.index("test --quiet") < plan.index("-m pytest")
