"""Optimizers and learning-rate schedules beside those of Keras, and the roles of variables."""

from grug_keras.optimizers.adamw import AdamW
from grug_keras.optimizers.muon import Muon
from grug_keras.optimizers.optax_optimizer import OptaxOptimizer
from grug_keras.optimizers.roles import ROLES, optimizer_table, role_in, role_of
from grug_keras.optimizers.schedule import Trapezoid
from grug_keras.optimizers.weight_decay import set_weight_decay

__all__ = [
    "ROLES",
    "AdamW",
    "Muon",
    "OptaxOptimizer",
    "Trapezoid",
    "optimizer_table",
    "role_in",
    "role_of",
    "set_weight_decay",
]
