"""Write kernels.npz: inputs and the kernels that neural-tangents computes for them, in float64 on the CPU.

Run in an environment of its own: pip install jax==0.4.38 jaxlib==0.4.38 neural-tangents==0.6.5 (TensorFlow is not
needed: the module that imports it is replaced by an empty one).
"""

import sys
import types
from pathlib import Path

import numpy as np

sys.modules["neural_tangents.experimental"] = types.ModuleType("neural_tangents.experimental")

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)

from neural_tangents import predict, stax  # noqa: E402

DENSE = {
    "relu": stax.serial(stax.Dense(1, 1.5, 0.1), stax.Relu(), stax.Dense(1, 1.3, 0.2), stax.Relu(), stax.Dense(1, 1.0, 0.1)),
    "erf": stax.serial(stax.Dense(1, 1.5, 0.1), stax.Erf(), stax.Dense(1, 1.3, 0.2), stax.Erf(), stax.Dense(1, 1.0, 0.0)),
    "gelu": stax.serial(stax.Dense(1, 1.2, 0.1), stax.Gelu(), stax.Dense(1, 1.3, 0.2), stax.Gelu(), stax.Dense(1, 1.0, 0.1)),
    "leaky_relu": stax.serial(stax.Dense(1, 1.5, 0.1), stax.LeakyRelu(0.1), stax.Dense(1, 1.0, 0.1)),
    "abs": stax.serial(stax.Dense(1, 1.0, 0.3), stax.Abs(), stax.Dense(1, 1.0, 0.1), stax.Abs(), stax.Dense(1)),
    "sin": stax.serial(stax.Dense(1, 1.1, 0.1), stax.Sin(), stax.Dense(1, 1.4, 0.1)),
    "cos": stax.serial(stax.Dense(1, 1.1, 0.1), stax.Cos(), stax.Dense(1, 1.4, 0.1)),
    "exp": stax.serial(stax.Dense(1, 0.5, 0.1), stax.Exp(), stax.Dense(1, 1.0, 0.1)),
    "gaussian": stax.serial(stax.Dense(1, 1.5, 0.1), stax.Gaussian(), stax.Dense(1, 1.0, 0.1)),
    "polynomial": stax.serial(stax.Dense(1, 1.0, 0.1), stax.Polynomial([0.3, -1.0, 0.5, 0.2]), stax.Dense(1, 1.0, 0.1)),
    "sign": stax.serial(stax.Dense(1, 1.5, 0.1), stax.Sign(), stax.Dense(1, 1.0, 0.1)),
    "residual": stax.serial(
        stax.Dense(1, 1.5, 0.1),
        stax.FanOut(2),
        stax.parallel(stax.Identity(), stax.serial(stax.Relu(), stax.Dense(1, 1.2, 0.1), stax.Erf(), stax.Dense(1, 1.1))),
        stax.FanInSum(),
        stax.Relu(),
        stax.Dense(1, 1.0, 0.1),
    ),
    "layer_norm": stax.serial(
        stax.Dense(1, 1.5, 0.1), stax.LayerNorm(eps=1e-5), stax.Relu(), stax.Dense(1, 1.2), stax.LayerNorm(eps=1e-5), stax.Dense(1)
    ),
    "dropout": stax.serial(
        stax.Dense(1, 1.5, 0.1), stax.Relu(), stax.Dropout(0.75, mode="train"), stax.Dense(1, 1.2, 0.1), stax.Erf(), stax.Dense(1)
    ),
}  # fmt: skip


def conv(size, W_std, b_std, padding="SAME", stride=1):
    return stax.Conv(1, (size, size), (stride, stride), padding, W_std, b_std)


CONVOLUTIONAL = {
    "flatten": stax.serial(conv(3, 1.4, 0.1), stax.Relu(), conv(3, 1.2, 0.2), stax.Relu(), stax.Flatten(), stax.Dense(1, 1.1, 0.1)),
    "valid": stax.serial(conv(3, 1.4, 0.1, "VALID"), stax.Erf(), conv(2, 1.2, 0.2, "VALID"), stax.Relu(), stax.Flatten(), stax.Dense(1)),
    "circular": stax.serial(conv(3, 1.4, 0.1, "CIRCULAR"), stax.Gelu(), conv(3, 1.2, 0.2, "CIRCULAR"), stax.Flatten(), stax.Dense(1)),
    "global_pool": stax.serial(conv(3, 1.4, 0.1), stax.Relu(), conv(3, 1.2, 0.2), stax.Relu(), stax.GlobalAvgPool(), stax.Dense(1, 1.1, 0.1)),
    "circular_pool": stax.serial(conv(3, 1.4, 0.1, "CIRCULAR"), stax.Erf(), conv(3, 1.1, 0.1, "CIRCULAR"), stax.Relu(), stax.GlobalAvgPool(), stax.Dense(1)),
    "average_pool": stax.serial(
        conv(3, 1.4, 0.1), stax.Relu(), stax.AvgPool((2, 2), (2, 2)), conv(3, 1.2, 0.2), stax.Relu(), stax.Flatten(), stax.Dense(1)
    ),
    "strided": stax.serial(conv(3, 1.4, 0.1, "SAME", 2), stax.Relu(), conv(2, 1.2, 0.2, "VALID"), stax.Relu(), stax.GlobalAvgPool(), stax.Dense(1)),
    "resnet": stax.serial(
        conv(3, 1.4, 0.1),
        stax.FanOut(2),
        stax.parallel(stax.Identity(), stax.serial(stax.Relu(), conv(3, 1.2, 0.1), stax.Relu(), conv(3, 1.1, 0.1))),
        stax.FanInSum(),
        stax.LayerNorm(eps=1e-5),
        stax.Relu(),
        stax.AvgPool((2, 2), (1, 1)),
        stax.Flatten(),
        stax.Dense(1, 1.0, 0.1),
    ),
}  # fmt: skip


def main() -> None:
    rng = np.random.default_rng(20)
    arrays = {
        "x1": rng.normal(size=(5, 7)),
        "x2": rng.normal(size=(4, 7)),
        "images1": rng.normal(size=(3, 5, 5, 3)),
        "images2": rng.normal(size=(2, 5, 5, 3)),
    }
    arrays["x2"][0] = arrays["x1"][1]  # a pair of equal inputs
    for group, networks, one, two in (
        ("dense", DENSE, arrays["x1"], arrays["x2"]),
        ("conv", CONVOLUTIONAL, arrays["images1"], arrays["images2"]),
    ):
        for name, (_, _, kernel_fn) in networks.items():
            for suffix, other in (("12", two), ("11", None)):
                kernels = kernel_fn(one, other, ("nngp", "ntk"))
                for get in ("nngp", "ntk"):
                    arrays[f"{group}/{name}/{get}{suffix}"] = np.asarray(getattr(kernels, get))
    y = rng.normal(size=(5, 2))
    arrays["predict/y"] = y
    _, _, kernel_fn = DENSE["erf"]
    predictor = predict.gradient_descent_mse_ensemble(
        kernel_fn, arrays["x1"], y, diag_reg=1e-3, learning_rate=0.7
    )
    for label, t in (("3", 3.0), ("100", 100.0), ("inf", None)):
        for get in ("nngp", "ntk"):
            if get == "nngp" and t is not None:
                continue
            mean, covariance = predictor(x_test=arrays["x2"], get=get, t=t, compute_cov=True)
            arrays[f"predict/{get}/{label}/mean"] = np.asarray(mean)
            arrays[f"predict/{get}/{label}/covariance"] = np.asarray(covariance)
    np.savez_compressed(Path(__file__).with_name("kernels.npz"), **arrays)
    print(len(arrays), "arrays")


if __name__ == "__main__":
    main()
