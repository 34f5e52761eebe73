"""Lowers the training step of scripts for 8 virtual devices: prints {script: what came of it}."""

import json
import os
import pathlib
import sys

os.environ.update(KERAS_BACKEND="jax", JAX_NUM_CPU_DEVICES="8", JAX_PLATFORMS="cpu")

from grug_keras import distribution
from grug_keras.distribution import sharding
from grug_keras.experiments.script import load_speedrun
from grug_keras.tpu.step import training_step
import keras
from test_speedruns import CONFIG

# At this size nothing is large: a matrix that no rule knows must be refused all the same.
sharding.LARGEST_COPY = 256


def lower(path):
    script = load_speedrun(path)
    recipe = next(iter(script.RECIPES.values()))
    distribution.distribute("data=4,model=2", getattr(script, "RULES", None))
    schedule = recipe.schedule()

    def build():
        model = script.build_model(CONFIG)
        model.compile(script.build_optimizer(schedule))
        return model

    step = training_step(build, 8, CONFIG.max_seq_len)
    text = step.lower().as_text()
    paths = [variable.path for variable in step.model.trainable_variables]
    split = step.state[0][paths.index(step.model.lm_head.kernel.path)].sharding
    keras.distribution.set_distribution(None)
    return "sharded" if "sharding" in text and split.num_devices == 8 else "not sharded"


def outcome(path):
    try:
        return lower(path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


print(json.dumps({pathlib.Path(p).stem: outcome(pathlib.Path(p)) for p in sys.argv[1:]}))
