"""What each unit of the Hopper GPU delivers, instruction by instruction."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="hopper_microbenchmarks",
    title="Benchmarking and Dissecting the Nvidia Hopper GPU Architecture",
    authors="Luo et al.",
    arxiv="2402.13499",
    room="hardware",
    figures=(
        Figure(
            "l2-latency",
            "Latency of the second-level cache",
            263.0,
            "clocks",
            "H800; Table IV",
        ),
        Figure(
            "global-bandwidth",
            "Bandwidth of global memory",
            1861.5,
            "GB/s",
            "H800, 91 % of peak; Table V",
        ),
        Figure(
            "wgmma-fp16",
            "Rate of dense wgmma, fp16 with fp32 accumulation",
            728.5,
            "TFLOP/s",
            "H800, N = 256, zero inputs; 665.4 with random ones; Table VIII",
        ),
        Figure(
            "wgmma-fp8",
            "Rate of dense wgmma, fp8 with fp32 accumulation",
            1447.5,
            "TFLOP/s",
            "H800, N = 256, zero inputs; Table VIII",
        ),
        Figure(
            "mma-share",
            "Share of the peak that mma.sync reaches",
            62.9,
            "%",
            "H800, mean",
        ),
        Figure(
            "dsm-latency",
            "Latency of distributed shared memory, clusters of 2",
            181,
            "clocks",
            "H800; Figure 8",
        ),
    ),
)
