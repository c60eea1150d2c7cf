"""Workers that share a machine share its cores: each computes with as many threads as it has cores of its own.

More threads than cores wait for one another in busy loops, and tests take several times as long.
"""

import os

import hypothesis
import pytest

# A slow moment of the machine is no failure.
hypothesis.settings.register_profile(
    "any-speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any-speed")

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    # Before torch is imported, and for the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))


def pytest_collection_modifyitems(items):
    """The tests that take minutes go first, or one worker would still run them when the others are done."""
    items.sort(key=lambda item: "test_interpreted[" not in item.nodeid)


@pytest.fixture
def threads(request):
    """The number of threads to compute with, given by `parametrize("threads", [...], indirect=True)`."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
