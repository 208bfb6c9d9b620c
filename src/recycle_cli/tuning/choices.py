"""The words that shape a mixture, apart from what they mean: checks and help need no torch."""

GRANULARITIES = ("adapter", "layer", "sublayer", "module", "dimension")
ACTIVATIONS = ("linear", "leaky-relu", "squared", "sigmoid", "softmax")
AFFINE = ("sigmoid", "softmax")
"""The activations that may be followed by a learned a f(c) + b."""
INITS = ("zero", "one", "equal", "normal", "uniform", "one-hot")
OPTIMIZERS = ("adamw", "ngopt")
SCORES = ("input", "grad")
LEVELS = ("parameter", "module")
RESTORES = ("zero", "init")
PROXIES = ("grad-norm", "snip", "synflow", "constant")
SIZED = ("snip", "synflow")
"""The proxies that weigh factors by their own size."""
LR_SCHEDULES = ("cosine", "linear", "constant", "step")
