"""The command line of the exporter: options, exit codes, and what it needs to show help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click.testing
import pytest

from latentedge.export.commands import lora_from, precisions_from
from latentedge.runtime.errors import UsageError

HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "diffusers", "transformers", "rich")


@pytest.mark.parametrize("command", ["export", "export-and-build", "verify", "inspect"])
def test_help_loads_nothing_heavy(command: str) -> None:
    program = (
        "import sys\n"
        "from latentedge.runtime.cli import run\n"
        f"code = run([{command!r}, '--help'], debug=False)\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    assert "--" in done.stdout
    assert done.stdout.count("\n  -") <= 12


def test_precisions() -> None:
    assert precisions_from("fp32, fp16,fp32") == ("fp32", "fp16")


def test_loras() -> None:
    assert lora_from("style.safetensors:0.8") == (Path("style.safetensors"), 0.8)
    assert lora_from("style.safetensors") == (Path("style.safetensors"), 1.0)
    with pytest.raises(UsageError, match="FILE:WEIGHT"):
        lora_from("style.safetensors:strong")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "from latentedge.runtime.cli import main; main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)


def test_wrong_use_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = run("export", str(tmp_path), "-o", str(tmp_path / "x.bundle"))
    assert done.returncode == 2
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert run("export", str(tmp_path)).returncode == 2
    assert run("export", "a", "-o", "b", "--target", "jetpack5").returncode == 2


def test_termination_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from latentedge.export import commands, sources\n"
        "from tests.export.tiny import DECODER, TinyDecoder, component, tiny_model\n"
        "def build():\n"
        f"    assert len(os.listdir({str(tmp_path)!r})) == 1\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return TinyDecoder()\n"
        "sources.load_source = lambda *_: tiny_model(component(DECODER, build))\n"
        "from latentedge.runtime.cli import run\n"
        f"sys.exit(run(['export', 'any', '-o', {str(tmp_path / 'x.bundle')!r}], debug=False))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 130
    assert "SIGTERM" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_export_and_build_writes_records_that_selection_reads(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    from latentedge.export.exporter import ExportOptions, export_source
    from latentedge.export.latency import measure_bundle
    from latentedge.export.summary import print_summary, summary_of
    from latentedge.runtime.machine import machine_fingerprint
    from latentedge.runtime.selection import latency_record
    from tests.export.tiny import UNET, TinyDenoiser, component, tiny_model

    model = tiny_model(component(UNET, TinyDenoiser))
    bundle = export_source(model, tmp_path / "tiny.bundle", ExportOptions(("fp32", "fp16")))
    messages: list[str] = []
    measured = measure_bundle(measure_bundle(bundle, "onnxruntime", messages.append), "onnxruntime", messages.append)
    assert messages == []
    for precision in ("fp32", "fp16"):
        record = latency_record(measured.component("unet"), "onnxruntime", precision, machine_fingerprint())
        assert record is not None
        assert 0 < record["seconds"] < 5
        assert record["ratio_low"] <= record["ratio"]
        records = measured.component("unet").variants[precision].measured
        assert [entry["kind"] for entry in records].count("latency") == 1
    assert latency_record(measured.component("unet"), "onnxruntime", "fp32", machine_fingerprint())["ratio"] == 1.0
    print_summary(measured)
    row = json.loads(json.dumps(summary_of(measured)))["components"]["unet"]["fp16"]
    assert row["psnr_db"] > row["floor_psnr_db"] == 45.0


def test_verify_and_inspect_on_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    from latentedge.export.exporter import ExportOptions, export_source
    from latentedge.runtime.inspect import inspect
    from latentedge.runtime.verify import verify
    from tests.export.tiny import DECODER, TinyDecoder, component, tiny_model

    bundle = export_source(tiny_model(component(DECODER, TinyDecoder)), tmp_path / "tiny.bundle", ExportOptions())
    runner = click.testing.CliRunner()
    shown = runner.invoke(inspect, [str(bundle.path)])
    assert shown.exit_code == 0
    assert "2*latent_height" in shown.output
    assert json.loads(runner.invoke(inspect, [str(bundle.path), "--json"]).output)["format"] == "latentedge-bundle"
    report = runner.invoke(verify, [str(bundle.path), "--backend", "onnxruntime", "--json"])
    assert json.loads(report.stdout)["ok"] is True
    path = bundle.variant("vae_decoder", "fp32")[0]
    path.write_bytes(path.read_bytes()[:-7])
    damaged = runner.invoke(verify, [str(bundle.path), "--backend", "onnxruntime"], standalone_mode=False)
    assert damaged.return_value == 1
    assert "vae_decoder/model.onnx" in damaged.output
    path.unlink()
    assert "missing" in runner.invoke(verify, [str(bundle.path)], standalone_mode=False).output
