"""The package: one registry however a folder is imported, and a wheel that holds everything."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_bare_import_makes_no_second_registry():
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "try:\n"
        "    import compressors\n"
        "except ImportError as error:\n"
        "    assert 'nutgraf.compressors' in str(error)\n"
        "else:\n"
        "    raise SystemExit('a second copy was imported')\n"
        "import nutgraf\n"
        "assert not [n for n in sys.modules if n.split('.')[0] == 'compressors']\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_package_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = ("compressors", "adapters", "recipes", "benchmarks")
    inits = [p for folder in folders for p in (ROOT / folder).rglob("__init__.py")]
    found = {"nutgraf", *(".".join(["nutgraf", *p.parent.relative_to(ROOT).parts]) for p in inits)}
    assert set(settings["packages"]) == found


def test_no_absolute_imports_of_the_package_inside_it():
    for folder in ("compressors", "adapters", "recipes", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for line in path.read_text().splitlines():
                assert not line.startswith(("from nutgraf", "import nutgraf")), f"{path}: {line}"


def test_arrows_of_import_run_one_way():
    allowed = {"compressors": set(), "adapters": {"compressors"}, "recipes": {"compressors"}}
    for folder, may in allowed.items():
        for path in (ROOT / folder).rglob("*.py"):
            for line in path.read_text().splitlines():
                words = line.strip().split()
                if words[:1] == ["from"] and words[1].startswith(".."):
                    target = words[1].lstrip(".").split(".")[0]
                    assert target in may | {folder} or target not in {*allowed, "benchmarks"}, f"{path}: {line}"


@pytest.mark.slow
def test_wheel_installed_elsewhere_works(tmp_path):
    """Built, unpacked in another folder and used from there: the import, the recipes, the sample and the shipped models."""
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(tmp_path.glob("nutgraf-*.whl"))
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import nutgraf, pathlib\n"
        f"assert pathlib.Path(nutgraf.__file__).is_relative_to({str(site)!r}), nutgraf.__file__\n"
        "reader = nutgraf.Reader.from_pretrained(nutgraf.pretrained('reader-small'))\n"
        "icae = nutgraf.load_compressor(nutgraf.pretrained('icae-small'), reader=reader)\n"
        "passages = icae.compress(['The treaty was signed in 1648 in Westphalia, ending thirty years of war.'])\n"
        "print(reader.generate([[*passages, '\\n\\nQuestion: Where was it signed?\\nAnswer:']]))\n"
        "from nutgraf.recipes.training.schema import load_recipe\n"
        "load_recipe('icae'); load_recipe('xrag'); load_recipe('reader')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    help_text = subprocess.run(
        [sys.executable, "-m", "nutgraf.cli", "--help"],
        cwd=tmp_path,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert all(command in help_text for command in ("train", "bench", "demo", "inspect"))
