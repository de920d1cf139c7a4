"""The command line on arm64, under qemu: ``pytest -m aarch64`` (docs/jetson.md says how the root is made).

LATENTEDGE_AARCH64_ROOT is a Debian arm64 root with python3.11; LATENTEDGE_AARCH64_PACKAGES a folder with arm64 wheels of
numpy, pillow, click, tokenizers and onnxruntime 1.23.2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.calibration.graphs import write_bundle

ROOT = Path(__file__).parents[2]
QEMU = shutil.which("qemu-aarch64-static")
SYSTEM, PACKAGES = os.environ.get("LATENTEDGE_AARCH64_ROOT"), os.environ.get("LATENTEDGE_AARCH64_PACKAGES")

pytestmark = [
    pytest.mark.aarch64,
    pytest.mark.skipif(QEMU is None, reason="qemu-aarch64-static is not here"),
    pytest.mark.skipif(not SYSTEM or not PACKAGES, reason="LATENTEDGE_AARCH64_ROOT or _PACKAGES is not set"),
]
PROGRAM = "from latentedge.runtime.cli import main; main()"


def drawn(python: list[str], bundle: Path, picture: Path, paths: str) -> np.ndarray:
    """The picture that ``latentedge generate`` writes with the interpreter ``python``."""
    options = ["--backend", "onnxruntime", "--precision", "fp32", "--steps", "4", "--seed", "7", "-o", str(picture)]
    done = subprocess.run(
        [*python, "-c", PROGRAM, "generate", str(bundle), *options],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return np.asarray(Image.open(picture)).astype(int)


def test_the_picture_of_arm64_is_that_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write_bundle(tmp_path / "bundle")
    package = tmp_path / "packages" / "latentedge"
    package.mkdir(parents=True)
    (package / "runtime").symlink_to(ROOT / "runtime")
    emulated = [str(QEMU), "-cpu", "cortex-a76", "-L", str(SYSTEM), f"{SYSTEM}/usr/bin/python3.11"]
    paths = os.pathsep.join([str(package.parent), str(PACKAGES)])
    there = drawn(emulated, tmp_path / "bundle", tmp_path / "arm64.png", paths)
    here = drawn([sys.executable], tmp_path / "bundle", tmp_path / "here.png", str(package.parent))
    assert here.std() > 10, "a plain picture would compare equal whatever was drawn"
    assert np.abs(there - here).max() <= 1
