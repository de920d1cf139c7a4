"""Energy that the board itself reports, by reader: RAPL counters, INA sensors of a Jetson, NVML."""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

#: Seconds between two readings of a power sensor.
PERIOD = 0.05

POWERCAP = Path("/sys/class/powercap")
INA = Path("/sys/bus/i2c/drivers/ina3221")


@dataclass
class Energy:
    """Joules while a context was open, and who reported them; ``None`` where nobody does."""

    joules: float | None = None
    source: str | None = None


@contextlib.contextmanager
def measured_energy() -> Iterator[Energy]:
    """Fill an :class:`Energy` at the end of the context, from the first reader that this machine has."""
    energy = Energy()
    for source, find in READERS.items():
        read = find()
        if read is not None:
            energy.source = source
            with read() as joules:
                yield energy
            energy.joules = joules()
            return
    yield energy


Reader = Callable[[], contextlib.AbstractContextManager[Callable[[], float]]]


def rapl(root: Path = POWERCAP) -> Reader | None:
    """Counters of the processor packages, where the user may read them (they are root's on most systems)."""
    counters = [path for path in root.glob("intel-rapl:?/energy_uj") if _readable(path)]
    if not counters:
        return None

    @contextlib.contextmanager
    def read() -> Iterator[Callable[[], float]]:
        before = [int(path.read_text()) for path in counters]
        ranges = [int((path.parent / "max_energy_range_uj").read_text()) for path in counters]
        yield lambda: sum(
            ((int(path.read_text()) - start) % limit) / 1e6
            for path, start, limit in zip(counters, before, ranges, strict=True)
        )

    return read


def ina(root: Path = INA) -> Reader | None:
    """The input rail of a Jetson's INA3221 (``VDD_IN``, or all rails where none is the input): volts times amperes."""
    channels = []
    for label in sorted(root.glob("*/hwmon/hwmon*/in*_label")):
        number = label.name.removeprefix("in").removesuffix("_label")
        current = label.with_name(f"curr{number}_input")
        if current.is_file():
            channels.append((label.read_text().strip(), label.with_name(f"in{number}_input"), current))
    chosen = [channel for channel in channels if channel[0] == "VDD_IN"] or channels
    if not chosen:
        return None
    return _sampled(lambda: sum(int(volt.read_text()) * int(ampere.read_text()) / 1e6 for _, volt, ampere in chosen))


def nvml() -> Reader | None:
    """Power draw of the first NVIDIA GPU, where the package nvidia-ml-py is installed."""
    try:
        library = importlib.import_module("pynvml")
        library.nvmlInit()
        handle = library.nvmlDeviceGetHandleByIndex(0)
        library.nvmlDeviceGetPowerUsage(handle)
    except ModuleNotFoundError:
        return None
    except Exception as error:
        if type(error).__module__.startswith("pynvml"):
            return None
        raise
    return _sampled(lambda: float(library.nvmlDeviceGetPowerUsage(handle)) / 1000)


#: Who is asked, in this order.
READERS: dict[str, Callable[[], Reader | None]] = {"ina3221": ina, "nvml": nvml, "rapl": rapl}


def _sampled(watts: Callable[[], float]) -> Reader:
    """Integrate a power sensor by the trapezoidal rule."""

    @contextlib.contextmanager
    def read() -> Iterator[Callable[[], float]]:
        stop, total = threading.Event(), [0.0]

        def sample() -> None:
            last, power = time.perf_counter(), watts()
            while True:
                stopped = stop.wait(PERIOD)
                now, current = time.perf_counter(), watts()
                total[0] += (now - last) * (power + current) / 2
                last, power = now, current
                if stopped:
                    return

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield lambda: total[0]
        finally:
            stop.set()
            thread.join()

    return read


def _readable(path: Path) -> bool:
    try:
        path.read_text()
    except OSError:
        return False
    return True
