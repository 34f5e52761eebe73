"""Muon and AdamW: the numbers of Keras's, with rates, decay and betas by role, on each backend."""

import json
import re

from grug_keras import GrugConfig, Grugformer
from grug_keras.best_guess import build_optimizer
from grug_keras.optimizers import AdamW, Muon, set_weight_decay
import keras
import numpy as np
import pytest

CONFIG = GrugConfig(40, 16, 24, 2, 4, 2, max_seq_len=12, qk_norm=True)
RATE, DECAY = 0.02, 0.5
OWN_BETA = {"beta_1": 0.8}


def fit(optimizer):
    """Three epochs of two steps, from the same weights on the same tokens."""
    keras.utils.set_random_seed(0)
    model = Grugformer(CONFIG)
    model.compile(optimizer)
    tokens = np.random.default_rng(0).integers(0, 40, (8, 13)).astype("int32")
    options = {"batch_size": 4, "epochs": 3, "verbose": 0, "shuffle": False}
    losses = model.fit(tokens[:, :-1], tokens[:, 1:], **options).history["loss"]
    return losses, model.get_weights()


@pytest.mark.parametrize(
    ("mine", "theirs", "options"),
    [
        (Muon, keras.optimizers.Muon, {"adam_lr_ratio": 0.3, "nesterov": True}),
        (AdamW, keras.optimizers.AdamW, {"beta_2": 0.95, "global_clipnorm": 0.5}),
        (AdamW, keras.optimizers.AdamW, {"amsgrad": True, "gradient_accumulation_steps": 2}),
    ],
    ids=["muon", "adamw", "adamw in parts"],
)
def test_without_options_by_role_the_numbers_are_those_of_keras(mine, theirs, options):
    """Momentum, decay, matrices of several shapes; but for the decay of norm scales."""
    options = {**options, "weight_decay": 0.1}
    reference = theirs(RATE, **options)
    reference.exclude_from_weight_decay(var_names=["scale"])
    if mine is Muon:  # by Keras's rules the head would be a matrix like others
        reference.exclude_layers = ["lm_head"]
    (losses, weights), (expected_losses, expected) = fit(mine(RATE, **options)), fit(reference)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for got, want in zip(weights, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def gradients(shape, steps=3):
    return np.random.default_rng(1).normal(size=(steps, *shape)).astype("float32")


def values(shape):
    return np.random.default_rng(2).normal(size=shape).astype("float32")


def train(optimizer, shapes, still=False):
    """Three steps of variables by name; equal shapes have equal values and gradients."""
    variables = [keras.Variable(values(shape), name=name) for name, shape in shapes.items()]
    optimizer.build(variables)
    for step in range(3):
        each = [gradients(shape)[step] * (not still) for shape in shapes.values()]
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in each], variables)
    return {v.name: keras.ops.convert_to_numpy(v.value) for v in variables}


def assert_equal(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_adamw_takes_rate_betas_and_decay_of_each_role():
    """Against AdamW of Keras for one weight. Decay is times the rate itself, not the role's."""
    own = {"lr_ratio": 0.1, "beta_1": 0.5, "beta_2": 0.7, "weight_decay": DECAY}
    optimizer = AdamW(
        RATE, weight_decay=0.1, roles={"a": "slow", "b": "head"}, by_role={"slow": own, "head": {}}
    )
    found = train(optimizer, {"a": (4, 6), "b": (4, 6)})
    slow = keras.optimizers.AdamW(0.1 * RATE, beta_1=0.5, beta_2=0.7, weight_decay=10 * DECAY)
    assert_equal(found["a"], train(slow, {"a": (4, 6)})["a"])
    usual = keras.optimizers.AdamW(RATE, weight_decay=0.1)
    assert_equal(found["b"], train(usual, {"b": (4, 6)})["b"])


def test_muon_takes_rate_momentum_and_decay_of_each_role():
    """Weights of one shape go through one stack: no figure of a role may reach another."""
    optimizer = Muon(
        RATE,
        weight_decay=0.1,
        adam_beta_2=0.95,
        roles={"a": "slow", "b": "matrix", "c": "head", "d": "other"},
        by_role={
            "slow": {"rule": "muon", "lr_ratio": 0.1, "momentum": 0.5, "weight_decay": DECAY},
            "head": {"lr_ratio": 0.2, "beta_1": 0.6, "weight_decay": DECAY},
        },
    )
    found = train(optimizer, dict.fromkeys("abcd", (4, 6)))
    alone = {
        "a": keras.optimizers.Muon(0.1 * RATE, momentum=0.5, weight_decay=10 * DECAY),
        "b": keras.optimizers.Muon(RATE, weight_decay=0.1),
        "c": keras.optimizers.AdamW(0.2 * RATE, beta_1=0.6, beta_2=0.95, weight_decay=5 * DECAY),
        "d": keras.optimizers.AdamW(RATE, beta_2=0.95),  # adam_weight_decay of both is 0.004
    }
    for name, reference in alone.items():
        assert_equal(found[name], train(reference, {name: (4, 6)})[name])
    assert (optimizer.adam_beta_1, optimizer.momentum) == (0.9, 0.95), "left as they were"


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 6, 4), (2, 2, 5, 3)])
def test_a_stack_is_as_many_matrices_to_muon(shape):
    options = {"weight_decay": 0.1, "momentum": 0.9}
    variable = keras.Variable(values(shape), name="experts")
    # A plain matrix of that shape goes through the same loop on JAX.
    plain = keras.Variable(values(shape[-2:]), name="plain")
    optimizer = Muon(RATE, roles={"experts|plain": "matrix"}, **options)
    optimizer.build([variable, plain])
    parts = values(shape).reshape(-1, *shape[-2:])
    parts = [keras.Variable(part, name="part") for part in parts]
    expected = keras.optimizers.Muon(RATE, **options)
    expected.build(parts)
    for step in range(3):
        gradient = gradients(shape)[step]
        of_plain = keras.ops.ones(shape[-2:])
        optimizer.apply([keras.ops.convert_to_tensor(gradient), of_plain], [variable, plain])
        of_parts = gradient.reshape(-1, *shape[-2:])
        expected.apply([keras.ops.convert_to_tensor(g) for g in of_parts], parts)
    want = np.stack([keras.ops.convert_to_numpy(part.value) for part in parts])
    assert_equal(keras.ops.convert_to_numpy(variable.value), want.reshape(shape))


@pytest.mark.parametrize("optimizer_class", [Muon, AdamW])
def test_vectors_decay_only_if_asked(optimizer_class):
    shapes = {"matrix": (4, 6), "scale": (6,), "head": (6, 4), "temperature": ()}
    roles = {"matrix": "matrix", "head": "head"}
    kept = (1 - RATE * DECAY) ** 3
    options = {"weight_decay": DECAY}
    if optimizer_class is Muon:
        options["adam_weight_decay"] = DECAY
    found = train(optimizer_class(RATE, roles=roles, **options), shapes, still=True)
    for name, factor in {"matrix": kept, "head": kept, "scale": 1, "temperature": 1}.items():
        assert_equal(found[name], factor * values(shapes[name]))
    asked = optimizer_class(
        RATE, roles=roles, by_role={"vector": {"weight_decay": DECAY}, "head": OWN_BETA}, **options
    )
    asked.exclude_from_weight_decay(var_names=["head"])
    found = train(asked, shapes, still=True)
    for name, factor in {"matrix": kept, "head": 1, "scale": kept, "temperature": kept}.items():
        assert_equal(found[name], factor * values(shapes[name]))


def test_the_role_decides_what_muon_trains_not_the_name():
    """Keras would give a weight with "embedding" in its path to AdamW."""
    name = "value_embedding"
    found = train(Muon(RATE, roles={name: "matrix"}), {name: (4, 6)})
    assert_equal(found[name], train(keras.optimizers.Muon(RATE), {"a": (4, 6)})["a"])
    adamw = Muon(RATE, roles={name: "matrix"}, by_role={"matrix": {"rule": "adamw"}})
    found = train(adamw, {name: (4, 6)})
    assert_equal(found[name], train(keras.optimizers.AdamW(RATE), {"a": (4, 6)})["a"])


def test_a_matrix_in_exclude_layers_trains_by_the_arguments_of_adamw():
    optimizer = Muon(
        RATE,
        adam_lr_ratio=0.3,
        exclude_layers=["gate"],
        roles={"gate": "matrix"},
        by_role={"matrix": {"lr_ratio": 9.0, "momentum": 0.1}},
    )
    want = keras.optimizers.AdamW(0.3 * RATE, weight_decay=0.004 / 0.3)
    assert_equal(train(optimizer, {"gate": (4, 6)})["gate"], train(want, {"a": (4, 6)})["a"])


@pytest.mark.parametrize("optimizer_class", [Muon, AdamW])
def test_roles_and_options_are_saved_as_plain_values(optimizer_class, tmp_path):
    roles = {r".*/token_embedding/embeddings": "own"}
    by_role = {"own": {"lr_ratio": 2, "weight_decay": 0.0, "beta_1": 0.8}}
    model = Grugformer(CONFIG)
    model.build()
    model.compile(optimizer_class(RATE, roles=roles, by_role=by_role))
    model.optimizer.build(model.trainable_variables)
    config = json.loads(json.dumps(keras.optimizers.serialize(model.optimizer)))
    model.save(tmp_path / "model.keras")
    for again in (
        keras.optimizers.deserialize(config),
        keras.models.load_model(tmp_path / "model.keras").optimizer,
    ):
        assert (again.roles, again.by_role) == (roles, by_role)
        for variable in model.trainable_variables:
            assert again.rule_of(variable) == model.optimizer.rule_of(variable)
            assert again.role_of(variable) == model.optimizer.role_of(variable)


FOR_BOTH = [
    ({"roles": "x"}, "roles must be a dict, got 'x'"),
    ({"by_role": [1]}, "by_role must be a dict, got [1]"),
    (
        {"roles": {"a": "big"}},
        "roles['a'] must be one of matrix, embedding, head, vector, other, "
        "or a key of by_role, got 'big'",
    ),
    ({"roles": {"a": ["head"]}}, "or a key of by_role, got ['head']"),
    ({"roles": {"(": "head"}}, "roles has '(', no regular expression: missing )"),
    ({"by_role": {"haed": {}}}, "by_role['haed'] must be one of matrix, embedding, head, "),
    ({"by_role": {"head": 2}}, "by_role['head'] must be a dict of options, got 2"),
    (
        {"by_role": {"head": {"beta1": 0.9}}},
        "by_role['head'] has no option 'beta1': adamw has lr_ratio, weight_decay, beta_1, beta_2",
    ),
    ({"by_role": {"head": {"momentum": 0.9}}}, "by_role['head'] has no option 'momentum'"),
    (
        {"by_role": {"head": {"lr_ratio": -1}}},
        "by_role['head']['lr_ratio'] must be a number of at least 0, got -1",
    ),
    ({"by_role": {"head": {"lr_ratio": "1"}}}, "['lr_ratio'] must be a number of at least 0"),
    ({"by_role": {"head": {"weight_decay": float("nan")}}}, "['weight_decay'] must be a number"),
    ({"by_role": {"head": {"weight_decay": True}}}, "['weight_decay'] must be a number"),
    ({"by_role": {"head": {"beta_2": 1.0}}}, "['beta_2'] must be a number in [0, 1), got 1.0"),
]
FOR_MUON = [
    (
        {"by_role": {"matrix": {"beta_1": 0.9}}},
        "by_role['matrix'] has no option 'beta_1': muon has lr_ratio, weight_decay, momentum",
    ),
    (
        {"by_role": {"matrix": {"rule": "sgd"}}},
        "by_role['matrix']['rule'] must be 'muon' or 'adamw', got 'sgd'",
    ),
    ({"exclude_embeddings": False}, "exclude_embeddings=False: roles decide what Muon trains"),
]
FOR_ADAMW = [({"by_role": {"head": {"rule": "muon"}}}, "by_role['head'] has no option 'rule'")]


@pytest.mark.parametrize(
    ("optimizer_class", "arguments", "message"),
    [(c, *case) for c in (Muon, AdamW) for case in FOR_BOTH]
    + [(Muon, *case) for case in FOR_MUON]
    + [(AdamW, *case) for case in FOR_ADAMW],
)
def test_a_wrong_argument_is_named_in_one_line(optimizer_class, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        optimizer_class(RATE, **arguments)
    assert "\n" not in str(error.value)


def test_a_vector_given_to_muon_is_named():
    message = r"Muon needs a matrix: scale of role 'matrix' has the shape \(6,\)"
    with pytest.raises(ValueError, match=message):
        train(Muon(RATE, roles={"scale": "matrix"}), {"scale": (6,)})


@pytest.mark.parametrize("optimizer_class", [Muon, AdamW])
def test_an_own_role_that_matches_nothing_is_named(optimizer_class):
    by_role = {"slow": {"lr_ratio": 0.1}}
    with pytest.raises(ValueError, match=r"roles\['scael'\] matches no trainable variable: missp"):
        train(optimizer_class(RATE, roles={"scael": "slow"}, by_role=by_role), {"scale": (6,)})


def test_a_weight_decay_is_set_with_its_ratio_to_others():
    optimizer = build_optimizer(RATE)
    set_weight_decay(optimizer, 0.05)
    assert optimizer.weight_decay == 0.05
    assert optimizer.adam_weight_decay == pytest.approx(0.05 * 0.4)
    own = AdamW(RATE, weight_decay=0.1, by_role={"head": {"weight_decay": 0.3}})
    set_weight_decay(own, 0.2)
    model = Grugformer(CONFIG)
    model.build()
    own.build(model.trainable_variables)
    decays = {own.role_of(v): own.rule_of(v).weight_decay for v in model.trainable_variables}
    assert decays == {"embedding": 0.2, "matrix": 0.2, "vector": 0.0, "head": 0.3}
    with pytest.raises(ValueError, match="weight_decay=0.1: Adam decays nothing; choose it in the"):
        set_weight_decay(keras.optimizers.Adam(RATE), 0.1)
