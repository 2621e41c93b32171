"""Table 1 of VideoChat-Flash, measured: from a video's frames to the first token of the answer."""

from bench import measured
from bench.conftest import DEVICE


def pytest_generate_tests(metafunc):
    timed = not metafunc.config.getoption("benchmark_disable")
    metafunc.parametrize(("impl", "frames"), measured.cases(DEVICE, timed))


def test_first_token(observe, benchmark, impl, frames):
    system = measured.systems(DEVICE)[impl]
    benchmark.group = f"first_token-{frames}frames-{measured.dtype_name(DEVICE)}"
    found = observe(lambda: measured.first_token(system, frames, DEVICE))
    if "oom_at_gb" in found:
        return
    assert found["first_token_s"] > 0
    assert (found["encode_s"] > 0) == system.vision
    assert (found["drop_s"] > 0) == (impl == "videochat_flash_drop")
