"""What is built from the repository is complete, and works from anywhere once installed."""

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "paligemma_jax"


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """Standard output of a command that knows nothing of the checkout; fails with its errors."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_"))}
    result = subprocess.run(
        command, cwd=cwd, env=environment, text=True, stdin=subprocess.DEVNULL, capture_output=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_every_package_is_named_in_setup_cfg():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    named = settings["options"]["packages"].split()
    directories = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    found = [".".join(directory.parts) for directory in directories]
    assert sorted(named) == sorted([*found, "paligemma_jax.checkpoints", "paligemma_jax.configs"])


def data_files() -> set[str]:
    """Names in a wheel of everything besides modules that the package needs."""
    inside = [PACKAGE / "py.typed", *(PACKAGE / "demo" / "fonts").iterdir()]
    beside = [ROOT / "checkpoints" / "README.md", *(ROOT / "configs").rglob("*.py")]
    beside += (path for path in (ROOT / "checkpoints" / "demo").rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in inside} | {
        f"paligemma_jax/{path.relative_to(ROOT).as_posix()}" for path in beside
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout to build in, without what earlier builds have left."""
    left = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", "__pycache__", "build", "dist", "*.egg-info"
    )
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=left)


@pytest.fixture(scope="module")
def dist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with an sdist, and the wheel that was built from it alone."""
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--outdir", out, source], cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the commands of a fresh environment into which the wheel was installed."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=True)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    run([scripts / "python", "-m", "pip", "install", "--quiet", wheel], cwd=home)
    return scripts


@pytest.mark.slow
def test_wheel_holds_modules_data_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert names == modules | data_files()


@pytest.mark.slow
def test_wheel_from_the_checkout_equals_the_one_from_the_sdist(
    source: Path, wheel: Path, tmp_path: Path
):
    run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, source], cwd=tmp_path)
    contents = []
    for path in (wheel, tmp_path / wheel.name):
        with zipfile.ZipFile(path) as archive:
            contents.append({info.filename: info.CRC for info in archive.infolist()})
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_tests_run_from_the_sdist(source: Path, dist: Path, tmp_path: Path):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    for folder in ("tests", "configs", "checkpoints", "notebooks"):
        wanted = {p.relative_to(source) for p in (source / folder).rglob("*") if p.is_file()}
        assert wanted <= {p.relative_to(tree) for p in tree.rglob("*")}
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "setup.cfg", "pyproject.toml"):
        assert (tree / name).is_file(), name
    tests = ["tests/models/test_huggingface_goldens.py", "tests/processing/test_tokenizer.py"]
    out = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=tree)
    assert " passed" in out


@pytest.mark.slow
def test_installed_packages_fit_together(scripts: Path, tmp_path: Path):
    run([scripts / "python", "-m", "pip", "check"], cwd=tmp_path)


@pytest.mark.slow
def test_installed_package_is_whole(scripts: Path, tmp_path: Path):
    program = """
from importlib import resources
import paligemma_jax
from paligemma_jax.demo.scene import FONTS, load_font
from paligemma_jax.loading import demo_checkpoint
assert (resources.files("paligemma_jax") / "py.typed").is_file()
for name in FONTS:
    load_font(name, 12)
print(demo_checkpoint())
"""
    found = Path(run([scripts / "python", "-c", program], cwd=tmp_path).strip())
    assert found.is_relative_to(scripts.parent)


@pytest.mark.slow
def test_installed_command_explains_itself(scripts: Path, tmp_path: Path):
    assert "caption" in run([scripts / "paligemma", "--help"], cwd=tmp_path)


@pytest.mark.slow
def test_installed_command_answers_from_any_directory(scripts: Path, tmp_path: Path):
    assert run([scripts / "paligemma", "demo"], cwd=tmp_path).strip()
    assert list(tmp_path.glob("*.png"))
