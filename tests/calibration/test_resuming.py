"""A calibration that was killed while it measured blocks goes on with the next one, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentedge.calibration import calibrate as whole
from latentedge.calibration import sensitivity
from latentedge.calibration.calibrate import Options, Reporter, calibrate
from latentedge.calibration.scene import Target
from latentedge.runtime.bundle import Bundle
from tests.calibration.graphs import write_bundle

PARTS = {"vae_decoder": "calibration/vae_decoder", "unet": "calibration"}
OPTIONS = Options(samples=3, pictures=2, backend="onnxruntime", threads=1)
#: Without times, which no two runs have alike, a calibration is a function of its bundle and options.
UNTIMED = Target("onnxruntime", "int8", "fp32", 1, timed=False)
RUN = """
import sys
from pathlib import Path
from tests.calibration import test_resuming as test
test.whole.target_of = lambda options: test.UNTIMED
test.calibrate(Path(sys.argv[1]), test.OPTIONS, test.Reporter(lambda *state: print(*state, flush=True)))
"""


def killed_in_the_denoisers_blocks(bundle: Bundle) -> None:
    """Start a calibration and kill it once two blocks of the denoiser are known; the decoder is done by then."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(bundle.path)], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert process.stdout is not None
    gated = False
    for line in process.stdout:
        gated = gated or line == "gate 1 1\n"
        if gated and line.startswith("blocks 2 "):
            os.kill(process.pid, signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


def test_killed_between_blocks_it_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "target_of", lambda options: UNTIMED)
    bundle = write_bundle(tmp_path / "killed.bundle", decoder_width=32)
    killed_in_the_denoisers_blocks(bundle)
    known = {part: sorted((bundle.path / PARTS[part] / "sensitivity").glob("*/block-*.json")) for part in PARTS}
    assert len(known["unet"]) >= 2
    for name in (".candidate-0123.onnx", ".model.fp32.observed-4567.onnx"):
        (bundle.variant("unet", "fp32")[0].parent / name).write_bytes(b"left by the killed run")
    computed: list[tuple[str, int]] = []

    def counting(function: Callable[[Any, int], Any], settings: Any, indexes: list[int]) -> Iterator[tuple[int, Any]]:
        for index in indexes:
            computed.append((function.__name__, index))
            yield index, function(settings, index)

    calibrate(bundle.path, OPTIONS, Reporter(), counting)
    total = {part: len(json.loads((bundle.path / PARTS[part] / "plan.json").read_text())["blocks"]) for part in PARTS}
    assert len(known["vae_decoder"]) == total["vae_decoder"]
    # Every sample and every block that was known is used; the rest of the denoiser's blocks is computed.
    assert computed == [("block_error", index) for index in range(len(known["unet"]), total["unet"])] != []
    assert not list((bundle.path / "calibration").rglob("sensitivity"))
    assert not [*bundle.path.rglob(".candidate*"), *bundle.path.rglob(".*.observed*")]

    fresh = write_bundle(tmp_path / "fresh.bundle", decoder_width=32)
    calibrate(fresh.path, OPTIONS, Reporter())
    for component, folder in PARTS.items():
        ends = [Bundle.open(path) for path in (bundle.path, fresh.path)]
        plans = [(end.path / folder / "plan.json").read_text() for end in ends]
        assert plans[0] == plans[1]
        graphs = [end.component(component).variants["int8"].sha256 for end in ends]
        assert graphs[0] == graphs[1]


def test_gains_that_are_known_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "test.bundle")
    measure, measured = sensitivity._gain_alone, list[str]()
    ended = 2

    def counting(plan: Any, block: Any, *others: Any) -> tuple[float, float]:
        if len(measured) == ended:
            raise KeyboardInterrupt
        measured.append(block.name)
        return measure(plan, block, *others)

    monkeypatch.setattr(sensitivity, "_gain_alone", counting)
    with pytest.raises(KeyboardInterrupt):
        calibrate(bundle.path, OPTIONS, Reporter())
    files = sorted((bundle.path / "calibration" / "sensitivity").glob("*/gain-*.json"))
    known = [json.loads(file.read_text()) for file in files]
    assert len(known) == ended
    before, ended = list(measured), 1000
    measured.clear()
    outcome = calibrate(bundle.path, OPTIONS, Reporter())
    names = [block.name for block in outcome.plan.blocks]
    assert [*before, *measured] == names
    assert [[block.seconds_saved, block.seconds_error] for block in outcome.plan.blocks[:2]] == known
