"""grug_keras: a tiny, readable best-guess language model in Keras 3."""

from grug_keras.backend import choose_backend

choose_backend()  # before anything imports Keras

from grug_keras import distribution, ops  # noqa: E402
from grug_keras.attention import CausalSelfAttention  # noqa: E402
from grug_keras.block import MLP, Block  # noqa: E402
from grug_keras.config import GrugConfig  # noqa: E402
from grug_keras.embedding import LMHead  # noqa: E402
from grug_keras.memory import keep_memory  # noqa: E402
from grug_keras.model import Grugformer  # noqa: E402
from grug_keras.optimizers import Muon, OptaxOptimizer, Trapezoid  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "MLP",
    "Block",
    "CausalSelfAttention",
    "GrugConfig",
    "Grugformer",
    "LMHead",
    "Muon",
    "OptaxOptimizer",
    "Trapezoid",
    "distribution",
    "keep_memory",
    "ops",
]
