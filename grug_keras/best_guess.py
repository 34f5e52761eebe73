"""The best guess as a recipe: how long and how fast each size trains, and with which optimizer.

An experiment changes one thing and takes the rest from here. It names its optimizer, so this file
of the core imports `grug_keras.optimizers`.
"""

import dataclasses
import math

from grug_keras.optimizers import Muon, Trapezoid


def _option(help, type=int, default=dataclasses.MISSING, flag=None):
    """A field that is an option of every script too."""
    return dataclasses.field(default=default, metadata={"help": help, "type": type, "flag": flag})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long and how fast a size trains.

    Args:
        steps: int, optimizer updates.
        batch_size: int, sequences per step.
        learning_rate: float, peak of the schedule.
        warmup: float, fraction of the steps in which the rate rises to the peak.
        cooldown: float, fraction of the steps in which it falls to zero.
        shape: str, of the fall: `"linear"` or `"cosine"`.
        accumulate: int, number of parts of a batch that are computed one after the other.
        weight_decay: float or None, instead of the optimizer's own; see
            `grug_keras.optimizers.set_weight_decay`.

    Raises:
        ValueError: names the argument and the value.

    Example:

    >>> Recipe(steps=300, batch_size=8, learning_rate=0.02).schedule()
    """

    steps: int = _option("Optimizer updates.")
    batch_size: int = _option("Sequences per step.", flag="--batch")
    learning_rate: float = _option("Peak of the schedule.", float)
    warmup: float = 0.05
    cooldown: float = _option("Fraction of the steps in which the rate falls.", float, default=0.7)
    shape: str = "linear"
    accumulate: int = _option("Parts of a batch, one after the other: less memory.", default=1)
    weight_decay: float | None = _option(
        "Of the matrices; other decays keep their ratio to it.", float, default=None
    )

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} must divide batch_size={self.batch_size}"
            )

    def schedule(self):
        """Returns the learning-rate schedule."""
        return Trapezoid(self.learning_rate, self.steps, self.warmup, self.cooldown, self.shape)


RECIPES = {
    # Tuned by `grug sweep` at 300 and at 1,000 steps.
    "smoke": Recipe(steps=1000, batch_size=8, learning_rate=0.007),
    # Steps and batches of Marin's grug, for its 128256-token vocabulary. Not tuned for Muon yet.
    "130m": Recipe(steps=11_760, batch_size=128, learning_rate=0.003),
    "300m": Recipe(steps=22_861, batch_size=128, learning_rate=0.003),
    "520m": Recipe(steps=47_883, batch_size=128, learning_rate=0.003),
    "1_2b": Recipe(steps=57_162, batch_size=256, learning_rate=0.003),
}


def build_optimizer(learning_rate, **changes):
    """Returns Muon for the matrices inside the blocks and AdamW for embedding, head and norms.

    Args:
        learning_rate: float or `keras.optimizers.schedules.LearningRateSchedule`.
        **changes: other arguments of `grug_keras.optimizers.Muon`, such as `roles`.
    """
    options = {
        "adam_lr_ratio": 0.3,
        "adam_beta_2": 0.95,
        "weight_decay": 0.01,
        "adam_weight_decay": 0.004,
    }
    return Muon(learning_rate, **{**options, **changes})
