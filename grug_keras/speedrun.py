"""What an experiment script imports: `from grug_keras.speedrun import Recipe, main`."""

from grug_keras.best_guess import RECIPES, Recipe, build_optimizer
from grug_keras.training.command import main

__all__ = ["RECIPES", "Recipe", "build_optimizer", "main"]
