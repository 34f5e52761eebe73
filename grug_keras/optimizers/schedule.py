"""A learning-rate schedule made by optax, for every backend."""

import keras
import numpy as np


@keras.saving.register_keras_serializable(package="grug_keras")
class Trapezoid(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, plateau, then linear or cosine cool-down to zero.

    The values come from optax once, as a table of `steps` numbers, so that TensorFlow and
    PyTorch follow the same schedule to the bit.

    Args:
        peak: float > 0, learning rate of the plateau.
        steps: int >= 1, optimizer updates in the whole run.
        warmup: float in [0, 1], fraction of the steps spent rising.
        cooldown: float in [0, 1], fraction spent falling; `warmup + cooldown <= 1`.
        shape: str, of the fall: `"linear"` or `"cosine"` (half a wave).

    Raises:
        ValueError: names the argument and the value.

    Example:

    >>> optimizer = keras.optimizers.AdamW(Trapezoid(3e-3, steps=1000))

    Reference: Hägele et al., https://arxiv.org/abs/2405.18392.
    """

    def __init__(self, peak, steps, warmup=0.05, cooldown=0.7, shape="linear"):
        if not peak > 0:
            raise ValueError(f"peak must be positive, got {peak}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        for name, value in (("warmup", warmup), ("cooldown", cooldown)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if warmup + cooldown > 1:
            raise ValueError(f"warmup + cooldown must be at most 1, got {warmup} + {cooldown}")
        if shape not in ("linear", "cosine"):
            raise ValueError(f"shape must be 'linear' or 'cosine', got {shape!r}")
        self.peak, self.steps, self.warmup, self.cooldown = peak, steps, warmup, cooldown
        self.shape = shape
        self._table = peak * self._relative_rates()

    def _relative_rates(self):
        """Rates by step relative to the peak, float32 `(steps,)`."""
        import optax  # takes a while, and only a schedule needs it

        rise, fall = round(self.warmup * self.steps), round(self.cooldown * self.steps)
        falls = {
            "linear": optax.linear_schedule(1.0, 0.0, max(fall, 1)),
            "cosine": optax.cosine_decay_schedule(1.0, max(fall, 1)),
        }
        curve = optax.join_schedules(
            [
                # The first step already learns: 1 / rise, not 0.
                optax.linear_schedule(1 / max(rise, 1), 1.0, max(rise - 1, 1)),
                optax.constant_schedule(1.0),
                # The last step still learns: 0 would come one step after the end.
                falls[self.shape],
            ],
            boundaries=[rise, self.steps - fall],
        )
        return np.asarray(curve(np.arange(self.steps)), dtype="float32")

    def at(self, step):
        """Returns the learning rate of update `step` (from 0), as a float."""
        return float(self._table[min(int(step), self.steps - 1)])

    def __call__(self, step):
        index = keras.ops.minimum(keras.ops.cast(step, "int32"), self.steps - 1)
        return keras.ops.take(keras.ops.convert_to_tensor(self._table), index)

    def get_config(self):
        names = ("peak", "steps", "warmup", "cooldown", "shape")
        return {name: getattr(self, name) for name in names}
