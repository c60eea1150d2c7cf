"""The battery over every Triton kernel in Triton's interpreter: kernels are checked where there is no GPU.

A process of its own, because Triton decides at import whether it interprets.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tensormill.operator import interpreting

BATTERY = Path(__file__).with_name("test_battery.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(interpreting(), reason="already interpreting")
def test_battery_interpreted(tmp_path):
    pytest.importorskip("triton")
    import tensormill

    source = str(Path(tensormill.__path__[0]).parent)
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",  # interpreted kernels take CPU tensors
        "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]),
    }
    for name in [k for k in environment if k.startswith(("PYTEST_", "TENSORMILL_IMPLEMENTATION"))]:
        del environment[name]  # a parallel or filtered outer run does not reach the inner one
    command = [sys.executable, "-m", "pytest", str(BATTERY), "-q", "-k", "triton", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=BATTERY.parents[2])
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed.group(1)) > 0, output[-4000:]
