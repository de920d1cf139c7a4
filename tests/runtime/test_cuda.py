import numpy as np
import pytest

from latentedge.runtime.engines import cuda
from latentedge.runtime.errors import EngineError
from tests.runtime.fake_cuda import FakeCuda


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(cuda, "api", lambda: fake)
    return fake


def test_every_function_used_exists_in_the_installed_bindings():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    names = [name for name in vars(FakeCuda) if name.startswith("_cuda")]
    assert len(names) > 15
    for name in names:
        assert hasattr(runtime, name[1:]), name
    for group in ("cudaMemcpyKind", "cudaStreamCaptureMode", "cudaDeviceAttr"):
        for member in getattr(FakeCuda, group):
            assert int(getattr(getattr(runtime, group), member.name)) >= 0
            if group != "cudaStreamCaptureMode":
                assert int(getattr(getattr(runtime, group), member.name)) == member.value
    assert int(runtime.cudaStreamNonBlocking) == FakeCuda.cudaStreamNonBlocking


def test_without_a_driver_the_real_bindings_give_an_error_with_a_hint():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    code, _ = runtime.cudaGetDeviceCount()
    if int(code) == 0:
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="cudaMalloc failed") as error:
        cuda.DeviceMemory(16)
    assert "doctor" in (error.value.hint or "")


def test_a_copy_there_and_back_keeps_the_bytes(fake: FakeCuda):
    stream = cuda.Stream()
    source = cuda.PinnedArray((2, 3), np.dtype(np.float16))
    target = cuda.PinnedArray((2, 3), np.dtype(np.float16))
    device = cuda.DeviceMemory(source.array.nbytes)
    source.array[...] = np.arange(6).reshape(2, 3)
    stream.to_device(device, source)
    stream.to_host(target, device)
    assert not np.array_equal(target.array, source.array), "nothing runs before the stream is waited for"
    stream.wait()
    np.testing.assert_array_equal(target.array, np.arange(6, dtype=np.float16).reshape(2, 3))
    for owned in (stream, source, target, device):
        owned.free()
        owned.free()
    assert fake.live() == 0
    assert fake.names().count("cudaFree") == 1
    assert fake.names().count("cudaFreeHost") == 2


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "uint8", "bool"])
def test_a_pinned_array_has_the_shape_and_dtype_asked_for(fake: FakeCuda, dtype: str):
    pinned = cuda.PinnedArray((3, 0, 2), np.dtype(dtype))
    assert (pinned.array.shape, pinned.array.dtype) == ((3, 0, 2), np.dtype(dtype))
    pinned = cuda.PinnedArray((), np.dtype(dtype))
    assert (pinned.array.shape, pinned.array.dtype) == ((), np.dtype(dtype))


def test_a_recorded_graph_runs_again_with_what_the_buffers_hold_then(fake: FakeCuda):
    stream, source = cuda.Stream(), cuda.PinnedArray((1,), np.dtype(np.int64))
    device, target = cuda.DeviceMemory(8), cuda.PinnedArray((1,), np.dtype(np.int64))
    with stream.capture() as recorded:
        stream.to_device(device, source)
        stream.to_host(target, device)
    for value in (3, 5):
        source.array[0] = value
        recorded[0].launch(stream)
        stream.wait()
        assert target.array[0] == value
    recorded[0].free()
    recorded[0].free()
    assert not fake.graphs, "the template and the executable graph are both given back"


def test_a_failed_recording_ends_the_capture_and_leaves_the_stream_usable(fake: FakeCuda):
    stream = cuda.Stream()
    with pytest.raises(RuntimeError, match="no"), stream.capture():
        raise RuntimeError("no")
    assert fake.captured is None
    assert not fake.graphs
    stream.wait()


def test_a_graph_that_cannot_be_instantiated_is_given_back(fake: FakeCuda):
    stream = cuda.Stream()
    fake.failures["cudaGraphInstantiate"] = 901
    with (
        pytest.raises(EngineError, match=r"cudaGraphInstantiate failed: fake error 901 \(error 901\)"),
        stream.capture(),
    ):
        pass
    assert not fake.graphs


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("cudaMalloc", lambda: cuda.DeviceMemory(4)),
        ("cudaMallocHost", lambda: cuda.PinnedArray((1,), np.dtype(np.uint8))),
        ("cudaStreamCreateWithFlags", cuda.Stream),
        ("cudaStreamSynchronize", lambda: cuda.Stream().wait()),
        ("cudaFree", lambda: cuda.DeviceMemory(4).free()),
        ("cudaDeviceGetAttribute", cuda.compute_capability),
    ],
)
def test_every_error_code_becomes_an_error_that_names_the_call(fake: FakeCuda, name: str, action):
    fake.failures[name] = 2
    with pytest.raises(EngineError, match=f"CUDA call {name} failed: fake error 2") as error:
        action()
    assert "memory" in (error.value.hint or "")


def test_compute_capability_is_major_and_minor(fake: FakeCuda):
    assert cuda.compute_capability() == "8.7"
