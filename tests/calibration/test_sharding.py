from __future__ import annotations

import pytest

from latentedge.calibration.capture import CaptureSettings, capture
from latentedge.calibration.records import pack
from latentedge.calibration.sharding import mapper_of, on_ray
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.errors import MissingDependencyError


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_statistics(bundle: Bundle) -> None:
    pytest.importorskip("ray")
    settings = CaptureSettings(str(bundle.path), samples=4, threads=1)
    whole, _ = capture(settings, bundle.path / "one")
    sharded, _ = capture(settings, bundle.path / "two", on_ray("local"))
    assert pack(dict(sorted(sharded.items())), []) == pack(dict(sorted(whole.items())), [])


def test_ray_missing_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match="ray") as error:
        mapper_of(1, "local")
    assert "latentedge[ray]" in str(error.value)
