"""For tests of Triton kernels: compiling them for sm_90 where there is no GPU, and reading what came of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import tensormill
from tensormill.operator import interpreting

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or interpreting(), reason="needs triton, not interpreting"
)

# What every script begins with: `build` compiles a kernel, `count` counts instructions that match a pattern, or gives None
# where there is no disassembler.
_PRELUDE = r"""
import json, re, subprocess, tempfile
from importlib import import_module
from pathlib import Path
import torch, triton, triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SPILLS = r"\b(?:STL|LDL)\b"

def build(kernel, types, constants, even=(), **options):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in even or signature[n][0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

def count(built, pattern):
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True).stdout
    return len(re.findall(pattern, text))
"""


def hopper_reports(script: str) -> list[dict[str, Any]]:
    """The JSON objects that a script prints, run in a process of its own whose kernels nothing has compiled before."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder, "TRITON_DEFAULT_FP_FUSION": "1"}
        source = str(Path(tensormill.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", _PRELUDE + script], capture_output=True, text=True, env=environment
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
