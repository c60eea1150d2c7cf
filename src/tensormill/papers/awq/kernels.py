"""The 4-bit linear layer beside other kernels: C3 on a GPU, C6 on a CPU."""

from __future__ import annotations

from tensormill.papers.awq.paper import PAPER
from tensormill.papers.catalogue import ClaimNotMeasurable, Measurement, Row, Run

KERNEL_SOURCES = ("tensormill.ops.linear_wna16", "tensormill.ops.benchmark", "tensormill.measure")
GPU_SHAPES = ((14336, 4096), (4096, 14336), (8192, 8192), (57344, 8192))
GPU_TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024)


@PAPER.claim(
    "C3",
    figure="speedup-cublas",
    statement="The 4-bit kernel is faster than cuBLAS fp16 on a GPU when few tokens are decoded",
    criterion="at least 1.8 times cuBLAS fp16 at M = 1 on 8192 x 8192, groups of 128",
    scales=("full",),
    needs=("cuda", "python:triton"),
    measures=KERNEL_SOURCES,
    peers=("gemlite", "humming-kernels", "triton"),
)
def gpu_kernel(run: Run) -> Measurement:
    """Time the packed linear beside cuBLAS and the other 4-bit kernels here, over tokens and shapes."""
    shapes = [(tokens, *shape) for shape in GPU_SHAPES for tokens in GPU_TOKENS]
    rows = _kernel_rows(run, shapes, "float16")
    ratio = _ratio(rows, "M=1 8192x8192", "fp16")
    return Measurement(rows, holds=ratio >= 1.8, reason=f"{ratio:.2f}x cuBLAS fp16 at M = 1 on 8192 x 8192")


@PAPER.claim(
    "C6",
    figure="speedup-cublas",
    statement="The 4-bit kernel is faster than 16-bit and other 4-bit kernels on a CPU when one token is decoded",
    criterion="at M = 1 on 4096 x 4096, at least 3 times torch's bf16 linear and level with torch's int4 operator",
    scales=("quick", "full"),
    needs=("cpu",),
    measures=KERNEL_SOURCES,
    peers=("onnxruntime",),
)
def cpu_kernel(run: Run) -> Measurement:
    """Time the packed linear beside torch's bf16 and int4 linears and ONNX Runtime's, on the CPU."""
    shapes = (
        [(1, 4096, 4096)] if run.scale == "quick" else [(m, n, k) for m in (1, 16) for n, k in GPU_SHAPES[:3]]
    )
    if run.scale == "full":
        shapes.insert(0, (1, 4096, 4096))
    rows = _kernel_rows(run, shapes, "bfloat16", device="cpu")
    dense, int4 = _ratio(rows, "M=1 4096x4096", "bf16"), _ratio(rows, "M=1 4096x4096", "int4")
    reason = f"{dense:.2f}x torch's bf16 linear, {int4:.2f}x its int4 operator"
    return Measurement(rows, holds=dense >= 3 and int4 >= 0.97, reason=reason)


def _kernel_rows(
    run: Run, shapes: list[tuple[int, int, int]], dtype: str, device: str | None = None
) -> list[Row]:
    """One row per shape: our microseconds, with limit and peers' microseconds beside them."""
    from tensormill.ops import OPERATORS
    from tensormill.ops.benchmark import benchmark, complete_shape

    operator = OPERATORS["linear_wna16"]
    rows = []
    for i, (tokens, out_features, in_features) in enumerate(shapes):
        name = f"M={tokens} {out_features}x{in_features}"
        run.progress(name, i / len(shapes))
        sizes = {"tokens": tokens, "out_features": out_features, "in_features": in_features, "dtype": dtype}
        shape = complete_shape(operator, {**sizes, "bits": 4, "group_size": 128})
        made = benchmark(operator, [shape], device or run.device, seconds=0.3 if len(shapes) > 8 else 1.0)
        if not made:
            raise ClaimNotMeasurable("no implementation of linear_wna16 runs here")
        best = min(made, key=lambda row: row.seconds)
        rows.append(
            Row(
                name,
                best.seconds * 1e6,
                "us",
                spread=(best.low * 1e6, best.high * 1e6),
                peers={peer: seconds * 1e6 for peer, seconds in best.peer_seconds.items()},
                limit=best.limit_seconds * 1e6,
                setting={"implementation": best.implementation, "dtype": dtype, "bits": 4, "group_size": 128},
            )
        )
    return rows


def _ratio(rows: list[Row], what: str, peer: str) -> float:
    """Peer's time over ours in the row `what`; the fastest of the peers whose name contains `peer`."""
    (row,) = (row for row in rows if row.what == what)
    times = [seconds for name, seconds in row.peers.items() if peer in name]
    if not times:
        raise ClaimNotMeasurable(f"no peer {peer} runs here; there are {', '.join(row.peers) or 'none'}")
    return min(times) / float(row.value)
