"""Triton kernels in Triton's interpreter, the battery over every one first: checks where there is no GPU.

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

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(interpreting(), reason="already interpreting")
@pytest.mark.parametrize(
    "name",
    [
        "test_battery.py",
        "test_clipping_error.py",
        "test_decode_attention_triton.py",
        "test_linear_wna16_triton.py",
        "test_linear_wna8_triton.py",
        "test_quantization_error.py",
    ],
)
def test_interpreted(name):
    pytest.importorskip("triton")
    import tensormill

    source = str(Path(tensormill.__path__[0]).parent)
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",  # interpreted kernels take CPU tensors
        "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]),
    }
    for variable in [k for k in environment if k.startswith(("PYTEST_", "TENSORMILL_IMPLEMENTATION"))]:
        del environment[variable]  # a parallel or filtered outer run does not reach the inner one
    options = ["-q", "-k", "triton", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", str(HERE / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1])
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed.group(1)) > 0, output[-4000:]
