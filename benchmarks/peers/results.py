"""Tables of ``RESULTS.md`` from what ``run.py`` measured: ``python -m latentedge.benchmarks.peers.results FILE...``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from latentedge.benchmarks.peers.run import GUIDANCE_SCALE

#: Headings of what ``run.MEASURED`` names.
COLUMNS = {
    "step": "step",
    "processor": "step, processor seconds",
    "mean": "mean step of a picture",
    "picture": "picture",
}


def table(result: dict[str, Any]) -> str:
    """One measured file as a Markdown table: seconds of this project and of the peer, and the ratio with its interval."""
    asked = {"own_interval": "1", "own_guidance": str(GUIDANCE_SCALE)}
    changed = [
        f", {name.removeprefix('own_')} {result[name]}" for name, plain in asked.items() if result[name] != plain
    ]
    settings = f"{result['workload']}, {result['threads']} threads, {result['own']}{''.join(changed)}"
    head = f"| {settings}: against | " + " | ".join(COLUMNS.values()) + " | peak memory |\n"
    lines = [head + "|---" * (len(COLUMNS) + 2) + "|"]
    for row in result["rows"]:
        if "failed" in row:
            lines.append(f"| {row['peer']} | {row['failed']} |" + " |" * len(COLUMNS))
            continue
        own, peer = (entry["peak_rss"] / 2**30 for entry in row["memory"])
        cells = [_cell(row.get(name)) for name in COLUMNS] + [f"{own:.2f} / {peer:.2f} GiB"]
        lines.append(f"| {row['peer']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    ratio = entry["ratio"]
    seconds = f"{entry['own']['p50']:.3f} / {entry['peer']['p50']:.3f} s"
    return f"{seconds}, **{ratio['ratio']:.2f}x** ({ratio['low']:.2f}-{ratio['high']:.2f})"


def main() -> None:
    """Write the tables of all files to stdout."""
    for name in sys.argv[1:]:
        sys.stdout.write(table(json.loads(Path(name).read_text(encoding="utf-8"))) + "\n")


if __name__ == "__main__":
    main()
