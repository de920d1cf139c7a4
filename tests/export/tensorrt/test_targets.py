"""The table in the documentation is the table that the exporter reads."""

from __future__ import annotations

from pathlib import Path

from latentedge.export.targets import targets

DOCUMENT = Path(__file__).parents[3] / "docs/targets.md"


def test_the_documented_table_is_the_exporters() -> None:
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    expected = [
        [
            f"`{target.name}`",
            target.description,
            str(target.opset),
            "one node" if target.group_normalization else "Reshape and InstanceNormalization",
            ", ".join(target.refused),
        ]
        for target in targets().values()
    ]
    assert rows == expected


def test_what_tensorrt_10_3_does_not_parse_is_not_emitted_for_jetpack_6() -> None:
    row = targets()["jetpack6"]
    assert row.opset <= 20
    assert {"Attention", "GroupNormalization", "RMSNormalization", "RotaryEmbedding", "Swish"} <= set(row.refused)
    assert all("Attention" in target.refused for target in targets().values()), "it has no FP32 kernel"
