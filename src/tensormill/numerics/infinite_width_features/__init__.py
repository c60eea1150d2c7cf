"""Feature learning at infinite width: parametrizations, muP for real models, exact limits and kernel baselines.

After Yang and Hu, "Feature Learning in Infinite-Width Neural Networks" (arXiv 2011.14522).

- `parametrization`: abc-parametrizations and the regime that each becomes as the width grows.
- `mup`: the maximal update parametrization of any module: hyper-parameters found small hold when wide.
- `limits`: linear networks with one hidden layer at infinite width, exactly.
- `kernels`: kernel limits (GP and NTK) of networks with one hidden layer, trained by SGD in function space.
- `word2vec`: CBOW with negative sampling, of finite and infinite width.
- `maml`: first- and second-order MAML over batches of tasks.
- `glyphs`: few-shot classes of drawn characters: Omniglot where it is present, generated strokes where not.
"""

from tensormill.numerics.infinite_width_features.glyphs import load_omniglot, procedural_strokes, rotated
from tensormill.numerics.infinite_width_features.kernels import InfiniteKernel1, Kernel1Config
from tensormill.numerics.infinite_width_features.limits import FiniteLinear1, InfiniteLinear1, Linear1Config
from tensormill.numerics.infinite_width_features.maml import (
    Accuracy,
    EpisodicSampler,
    KernelMAML,
    MAMLConfig,
    Tasks,
    adapt,
    meta_evaluate,
    meta_gradient,
    meta_train,
)
from tensormill.numerics.infinite_width_features.mup import (
    BaseShapes,
    CoordinateCheck,
    MuReadout,
    ParameterScale,
    WidthScaling,
    attention_scale,
    coord_check,
    parametrize,
    scale_attention,
)
from tensormill.numerics.infinite_width_features.parametrization import ABC, ABCNetwork, Regime, classify
from tensormill.numerics.infinite_width_features.word2vec import (
    CBOW,
    CBOWConfig,
    Corpus,
    InfiniteCBOW,
    analogy_accuracy,
    load_word_vectors,
    planted_analogies,
    save_word_vectors,
    train_cbow,
)

__all__ = [
    "ABC",
    "CBOW",
    "ABCNetwork",
    "Accuracy",
    "BaseShapes",
    "CBOWConfig",
    "CoordinateCheck",
    "Corpus",
    "EpisodicSampler",
    "FiniteLinear1",
    "InfiniteCBOW",
    "InfiniteKernel1",
    "InfiniteLinear1",
    "Kernel1Config",
    "KernelMAML",
    "Linear1Config",
    "MAMLConfig",
    "MuReadout",
    "ParameterScale",
    "Regime",
    "Tasks",
    "WidthScaling",
    "adapt",
    "analogy_accuracy",
    "attention_scale",
    "classify",
    "coord_check",
    "load_omniglot",
    "load_word_vectors",
    "meta_evaluate",
    "meta_gradient",
    "meta_train",
    "parametrize",
    "planted_analogies",
    "procedural_strokes",
    "rotated",
    "save_word_vectors",
    "scale_attention",
    "train_cbow",
]
