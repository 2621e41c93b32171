"""Table 7 of VideoChat-Flash, measured: what dropping visual tokens inside the model saves."""

import pytest

from bench import measured
from bench.conftest import DEVICE
from hico_model.paper_tables import TABLE7
from hico_model.tables import FRAMES, TEXT, plan_name, plan_of

PLANS = {plan_name(plan): plan for plan in map(plan_of, TABLE7)}


@pytest.mark.parametrize("impl", PLANS)
def test_dropping(observe, benchmark, timed, impl):
    system = measured.systems(DEVICE)["videochat_flash"]
    frames = FRAMES if timed or DEVICE == "cuda" else 64
    benchmark.group = f"dropping-{frames}frames-{measured.dtype_name(DEVICE)}"
    found = observe(
        lambda: measured.first_token(system, frames, DEVICE, text=TEXT, plan=PLANS[impl])
    )
    assert (found["drop_s"] > 0) == (impl != "none")
