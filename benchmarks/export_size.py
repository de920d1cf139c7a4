"""How much memory and time an export of Stable Diffusion 1.5's size takes, with random weights.

``python -m latentedge.benchmarks.export_size [FOLDER] [--precision fp32,fp16]`` writes a checkpoint of the real
architecture to FOLDER (or a temporary one), runs ``latentedge export`` on it in a process of its own, and prints as
JSON: seconds, peak memory of that process, and the size of the bundle.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

#: The published configuration of Stable Diffusion 1 (CompVis/stable-diffusion, configs/stable-diffusion/v1-inference).
CONFIG: dict[str, Any] = {
    "model": {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.00085,
            "linear_end": 0.0120,
            "timesteps": 1000,
            "first_stage_key": "jpg",
            "cond_stage_key": "txt",
            "image_size": 64,
            "channels": 4,
            "conditioning_key": "crossattn",
            "scale_factor": 0.18215,
            "use_ema": False,
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {
                    "image_size": 32,
                    "in_channels": 4,
                    "out_channels": 4,
                    "model_channels": 320,
                    "attention_resolutions": [4, 2, 1],
                    "num_res_blocks": 2,
                    "channel_mult": [1, 2, 4, 4],
                    "num_heads": 8,
                    "use_spatial_transformer": True,
                    "transformer_depth": 1,
                    "context_dim": 768,
                    "legacy": False,
                },
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {
                    "embed_dim": 4,
                    "ddconfig": {
                        "double_z": True,
                        "z_channels": 4,
                        "resolution": 256,
                        "in_channels": 3,
                        "out_ch": 3,
                        "ch": 128,
                        "ch_mult": [1, 2, 4, 4],
                        "num_res_blocks": 2,
                        "attn_resolutions": [],
                        "dropout": 0.0,
                    },
                    "lossconfig": {"target": "torch.nn.Identity"},
                },
            },
            "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
        },
    }
}
#: Where a checkpoint keeps each network, by its configuration.
PREFIXES = {
    "unet_config": "model.diffusion_model.",
    "first_stage_config": "first_stage_model.",
    "cond_stage_config": "cond_stage_model.",
}


def write_checkpoint(folder: Path) -> int:
    """Write ``model.safetensors`` and ``model.yaml`` with random weights; gives the number of parameters."""
    import safetensors.torch
    import yaml

    from latentedge.export.models.registry import build_network

    state: dict[str, Any] = {}
    for name, prefix in PREFIXES.items():
        config = CONFIG["model"]["params"][name]
        network = build_network(config["target"], config.get("params", {}))
        for key, parameter in network.named_parameters():
            # Branches that start at zero would make every output zero.
            if not parameter.data.any():
                parameter.data.normal_(0.0, 0.5 / max(parameter[0].numel(), 1) ** 0.5)
            state[prefix + key] = parameter.data
    safetensors.torch.save_file(state, folder / "model.safetensors")
    (folder / "model.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return sum(tensor.numel() for tensor in state.values())


def measure_export(folder: Path, precision: str) -> dict[str, Any]:
    """Export the checkpoint in ``folder`` in a new process, and delete the bundle."""
    bundle = folder / "export.bundle"
    program = "from latentedge.runtime.cli import main; main()"
    command = [sys.executable, "-c", program, "export", str(folder), "-o", str(bundle)]
    start = time.perf_counter()
    done = subprocess.run([*command, "--precision", precision, "--json"], stdout=subprocess.PIPE, check=True)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    shutil.rmtree(bundle)
    return {
        "precision": precision,
        "seconds": round(seconds, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        # Linux counts kibibytes.
        "peak_gib": round(used.ru_maxrss / 2**20, 2),
        "bundle_gb": round(size / 1e9, 2),
        "components": json.loads(done.stdout)["components"],
    }


@click.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--precision", default="fp32", show_default=True, help="Variants to write.")
def main(folder: Path | None, precision: str) -> None:
    """Measure the export of a model of Stable Diffusion 1.5's size."""
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "model.safetensors").is_file():
            click.echo(f"{write_checkpoint(place) / 1e6:.0f}M parameters written to {place}", err=True)
        click.echo(json.dumps(measure_export(place, precision), indent=2))


if __name__ == "__main__":
    main()
