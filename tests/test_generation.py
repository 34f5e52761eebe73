"""Generation and scoring, against the whole model run again for every token."""

import dataclasses
import pathlib
import warnings

from grug_keras import Block, CausalSelfAttention, GrugConfig, Grugformer, ops
from grug_keras.experiments.script import load_speedrun
from grug_keras.generation import score_tokens, stream
from grug_keras.generation.compiled import compiled
from grug_keras.generation.samplers import find_sampler, nucleus
from grug_keras.generation.steps import next_logits, read_prompts
import keras
from models import logits_of, seeded_model
import numpy as np
import pytest

to_numpy = keras.ops.convert_to_numpy
DEPTH = pathlib.Path(__file__).parent / "depth"
CONFIG = GrugConfig(
    61, 16, 24, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=32, initializer_std=0.3
)
PROMPTS = [[1, 2, 3], [9, 8, 7, 6, 5, 4, 3], [60]]
STRETCHED = {
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_seq_len": 16,
}


def slow_on_tensorflow(test):
    """XLA compiles each of these for seconds there; JAX and PyTorch tell what they prove."""
    return pytest.mark.slow(test) if keras.config.backend() == "tensorflow" else test


class SinkAttention(CausalSelfAttention):
    def build(self, input_shape):
        super().build(input_shape)
        self.sinks = self.add_weight(name="sinks", shape=(self.num_heads,), initializer="ones")

    def attend(self, q, k, v, mask):
        return ops.attention(q, k, v, mask, sinks=self.sinks)


class SinkBlock(Block):
    attention_class = SinkAttention


def build(config=CONFIG, **options):
    return seeded_model(config, **options)


@pytest.fixture(scope="module")
def model():
    return build()


def greedy(model, prompt, count, vocab_size=None):
    """Runs the whole model, always of one length so that it compiles once, for each token."""
    tokens = np.zeros((1, model.config.max_seq_len), "int32")
    tokens[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + count):
        tokens[0, end] = logits_of(model, tokens)[0, end - 1, :vocab_size].argmax()
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": (5, None), "qk_norm": True},
        {"sliding_window": 3, "tie_embeddings": True, "rope_scaling": STRETCHED},
        {"block_class": SinkBlock, "num_kv_heads": 1, "remat": "full"},
    ],
    ids=["grouped", "window", "ring tied", "sinks"],
)
def test_a_cache_gives_the_logits_of_the_whole_model_token_by_token(changes, rng):
    block_class = changes.pop("block_class", Block)
    model = build(dataclasses.replace(CONFIG, **changes), block_class=block_class)
    tokens = rng.integers(0, 61, (3, 16), dtype="int32")
    want = logits_of(model, tokens)
    lengths = np.array([1, 9, 4], "int32")
    slots = read_prompts(model, *map(keras.ops.convert_to_tensor, (tokens, lengths)), 16)

    def make():
        return lambda *state: next_logits(model, 61, *state)

    step = compiled(model, ("test",), make)
    for place in range(7):
        position = lengths - 1 + place
        token = tokens[np.arange(3), position]
        got, _, slots = step(
            keras.ops.convert_to_tensor(token), slots, keras.ops.convert_to_tensor(position)
        )
        np.testing.assert_allclose(to_numpy(got), want[np.arange(3), position], atol=1e-5)


def test_greedy_rows_of_unequal_prompts_are_those_of_the_whole_model(model):
    want = [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert [row.tolist() for row in model.generate(PROMPTS, 12)] == want
    assert model.generate(np.array([PROMPTS[0]]), 12)[0].tolist() == want[0]
    few = greedy(model, PROMPTS[0], 12, vocab_size=20)
    assert max(few) < 20
    assert model.generate(PROMPTS[:1], 12, vocab_size=20)[0].tolist() == few
    parts = list(stream(model, PROMPTS, 12, every=5))
    assert [len(part[0]) for part in parts] == [5, 5, 2]
    assert [np.concatenate(row).tolist() for row in zip(*parts, strict=True)] == want


@pytest.mark.slow
def test_what_is_added_to_keys_and_values_by_token_needs_no_fallback():
    """`trunk` gives each block embeddings of the tokens besides; no fast test's model does."""
    script = load_speedrun(DEPTH / "value_embeddings.py")
    model = build(model_class=script.build_model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = model.generate(PROMPTS[:1], 4)[0].tolist()
    assert found == greedy(model, PROMPTS[0], 4)


@slow_on_tensorflow
def test_a_long_prompt_is_read_by_the_blocks_of_training():
    """Above 256 positions attention is another implementation, which takes rules, not a cache."""
    model = build(dataclasses.replace(CONFIG, max_seq_len=512, sliding_window=(None, 40)))
    prompt = (np.arange(300) * 7 % 61).tolist()
    assert model.generate([prompt], 3)[0].tolist() == greedy(model, prompt, 3)


def test_a_row_ends_before_its_stop_token(model):
    want = [greedy(model, prompt, 12) for prompt in PROMPTS]
    stop = [want[0][4], want[1][7]]
    ends = [min([row.index(s) for s in stop if s in row], default=12) for row in want]
    found = model.generate(PROMPTS, 12, stop=stop)
    assert [row.tolist() for row in found] == [row[:end] for row, end in zip(want, ends)]  # noqa: B905
    assert model.generate(PROMPTS[:1], 12, stop=np.array(want[0][0]))[0].tolist() == []
    parts = list(stream(model, PROMPTS, 12, every=1, stop=[row[2] for row in want]))
    ends = [min(row.index(s[2]) for s in want if s[2] in row) for row in want]
    assert len(parts) == max(ends) + 1  # and not for the row that pads the batch


@slow_on_tensorflow
def test_samplers_are_seeded_and_the_given_object_is_too(model):
    sampler = nucleus(61, 0.9)
    first, again, other = (
        model.generate(PROMPTS, 12, sampler=sampler, seed=s)[1].tolist() for s in (1, 1, 2)
    )
    assert first == again != other
    drawn = model.generate([[1]] * 64, 1, sampler="random", vocab_size=3)
    share = np.exp(logits_of(model, [[1]])[0, 0, :3].astype("float64"))
    share /= share.sum()
    found = np.bincount(np.concatenate(drawn), minlength=3) / 64
    flat = build(dataclasses.replace(CONFIG, initializer_std=1e-6))
    assert len(set(flat.generate([[1]], 30, sampler="random")[0].tolist())) > 15
    np.testing.assert_allclose(found, share, atol=4 * np.sqrt(0.25 / 64))


@slow_on_tensorflow
def test_a_sampler_that_is_changed_counts_and_an_equal_one_compiles_nothing(model, monkeypatch):
    import keras_hub

    sampler = keras_hub.samplers.RandomSampler(temperature=50.0)
    hot = model.generate([[1, 2]], 12, sampler=sampler)[0].tolist()
    sampler.temperature = 1e-4
    assert model.generate([[1, 2]], 12, sampler=sampler)[0].tolist() == greedy(model, [1, 2], 12)
    traced = []
    call = Grugformer.call
    monkeypatch.setattr(Grugformer, "call", lambda *a, **k: traced.append(1) or call(*a, **k))
    equal = keras_hub.samplers.RandomSampler(temperature=50.0)
    assert model.generate([[1, 2]], 12, sampler=equal)[0].tolist() == hot
    assert not traced or keras.config.backend() == "torch"


@slow_on_tensorflow
def test_a_list_of_a_sampler_of_one_s_own_counts(model):
    import keras_hub

    class Without(keras_hub.samplers.GreedySampler):
        def __init__(self, forbidden):
            super().__init__()
            self.forbidden = forbidden

        def get_next_token(self, probabilities):
            ids = np.zeros(probabilities.shape[-1], "float32")
            ids[self.forbidden] = 1
            return keras.ops.argmax(probabilities - ids, axis=-1)

    sampler, found = Without([]), []
    for _ in range(3):
        found += model.generate([[1, 2]], 1, sampler=sampler)[0].tolist()
        sampler.forbidden.append(found[-1])
    assert found[0] == greedy(model, [1, 2], 1)[0]
    assert len(set(found)) == 3


def test_a_context_that_is_no_power_of_two_is_used_whole():
    model = build(dataclasses.replace(CONFIG, max_seq_len=100))
    prompt = (np.arange(70) * 7 % 61).tolist()
    assert model.generate([prompt], 30)[0].tolist() == greedy(model, prompt, 30)


@slow_on_tensorflow
def test_weights_are_those_of_now_in_a_callback_of_fit():
    model = build(seed=2)
    model.compile(keras.optimizers.SGD(0.5))
    tokens = np.random.default_rng(0).integers(0, 61, (4, 9))
    found = []

    def look(batch, logs):
        found.append((model.generate([[1, 2]], 4)[0].tolist(), model.score([[1, 2, 3]])[0]))

    look = keras.callbacks.LambdaCallback(on_train_batch_end=look)
    model.fit(tokens[:, :-1], tokens[:, 1:], batch_size=2, callbacks=[look], verbose=0)
    assert found[-1][0] == greedy(model, [1, 2], 4)
    np.testing.assert_allclose(found[-1][1], model.score([[1, 2, 3]])[0], atol=1e-6)
    assert not np.allclose(found[0][1], found[1][1])


@slow_on_tensorflow
def test_scores_hold_a_slice_of_the_logits(model, rng, monkeypatch):
    monkeypatch.setattr("grug_keras.generation.log_likelihoods.LOGITS", 61 * 7)
    rows = rng.integers(0, 61, (3, 20))
    few = build()
    np.testing.assert_allclose(few.score(rows), model.score(rows), atol=1e-5)


@pytest.mark.jax
def test_scores_of_a_large_vocabulary_take_little_memory():
    from grug_keras.generation.log_likelihoods import _score
    import jax

    model = build(dataclasses.replace(CONFIG, vocab_size=131072, max_seq_len=256))
    tokens = jax.ShapeDtypeStruct((32, 257), "int32")
    program = jax.jit(lambda tokens: _score(model, tokens)).lower(tokens).compile()
    assert program.memory_analysis().temp_size_in_bytes < 200 * 2**20


@pytest.mark.slow
def test_beams_find_the_likeliest_rows():
    """Against all rows there are; beams compile a program of their own."""
    import keras_hub

    model = build(dataclasses.replace(CONFIG, vocab_size=6))
    sampler = keras_hub.samplers.BeamSampler(num_beams=36)
    found = model.generate([[1, 2], [3, 4, 5]], 3, sampler=sampler)
    every = np.stack(np.meshgrid(*[np.arange(6)] * 3, indexing="ij"), -1).reshape(-1, 3)
    for prompt, row in zip(([1, 2], [3, 4, 5]), found, strict=True):
        rows = [[*prompt, *new] for new in every.tolist()]
        sums = [s[len(prompt) - 1 :].sum() for s in model.score(rows)]
        assert row.tolist() == every[np.argmax(sums)].tolist()
    ends = [row.tolist().index(0) if 0 in row else 3 for row in found]
    stopped = model.generate([[1, 2], [3, 4, 5]], 3, sampler=sampler, stop=0)
    assert [row.tolist() for row in stopped] == [
        row[:end].tolist() for row, end in zip(found, ends, strict=True)
    ]
    with pytest.raises(ValueError, match="BeamSampler searches: it cannot stream"):
        stream(model, [[1]], 2, sampler=sampler)


@slow_on_tensorflow
def test_a_model_that_no_cache_suits_runs_whole_and_says_so_once():
    script = load_speedrun(DEPTH / "hashed_bigrams.py")
    model = build(model_class=script.build_model)
    want = [greedy(model, prompt, 5) for prompt in PROMPTS]
    with pytest.warns(UserWarning, match="HashedBigrams cannot be run token by token"):
        found = model.generate(PROMPTS, 5)
    assert [row.tolist() for row in found] == want
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate(PROMPTS, 5)
        with pytest.raises(ValueError, match="BeamSampler needs a model that a cache"):
            model.generate(PROMPTS, 5, sampler="beam")


class Shift(Block):
    """Adds a share of the token before; the share is 0 when training starts."""

    def build(self, input_shape):
        super().build(input_shape)
        self.share = self.add_weight(name="share", shape=(), initializer="zeros")

    def call(self, x, positions=None, attention_mask=None):
        before = keras.ops.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return super().call(x + self.share * before, positions, attention_mask)


class Cold(Grugformer):
    def logits(self, inputs):
        return 2 * super().logits(inputs)


class BottomRight(CausalSelfAttention):
    """Takes the last query for that of the last key, as many write masks."""

    def attend(self, q, k, v, mask):
        ahead = k.shape[1] - q.shape[1]
        rule = np.arange(k.shape[1]) <= np.arange(q.shape[1])[:, None] + ahead
        return ops.attention(q, k, v, rule)


class BottomRightBlock(Block):
    attention_class = BottomRight


class Narrow(CausalSelfAttention):
    """A window of its own within that of the model."""

    def attend(self, q, k, v, mask):
        return ops.attention(q, k, v, dataclasses.replace(mask, sliding_window=3))


class NarrowBlock(Block):
    attention_class = Narrow


class ByToken(Grugformer):
    """A document of its own from each token 7 on."""

    def call(self, inputs, training=None, cache=None):
        if not isinstance(inputs, dict) or inputs.get("positions") is None:
            tokens = inputs["token_ids"] if isinstance(inputs, dict) else inputs
            documents = 1 + keras.ops.cumsum(keras.ops.cast(tokens == 7, "int32"), axis=1)
            inputs = {"token_ids": tokens, "segment_ids": documents}
        return super().call(inputs, training=training, cache=cache)


@slow_on_tensorflow
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"block_class": BottomRightBlock}, {}),
        ({"block_class": NarrowBlock}, {"sliding_window": 12}),
        pytest.param({"model_class": ByToken}, {}, marks=pytest.mark.slow),
    ],
    ids=["own mask", "own window", "documents"],
)
def test_what_is_right_for_the_prompt_alone_is_not_trusted(options, changes):
    model = build(dataclasses.replace(CONFIG, **changes), **options)
    prompt = [3, 7, 9, 7, 2, 1, 4, 8, 7, 5, 6, 30, 31, 32, 33]
    with pytest.warns(UserWarning, match="cannot be run token by token"):
        found = model.generate([prompt], 8)
    assert found[0].tolist() == greedy(model, prompt, 8)


@slow_on_tensorflow
def test_a_gate_that_opens_later_is_seen():
    model = build(block_class=Shift)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate([[1]], 2)
    for block in model.blocks:
        block.share.assign(0.5)
    with pytest.warns(UserWarning, match="Shift cannot be run token by token.*differ by"):
        found = model.generate([[1, 2]], 5)
    assert found[0].tolist() == greedy(model, [1, 2], 5)


@slow_on_tensorflow
def test_other_weights_count_and_other_prompts_of_a_bucket_compile_nothing(model, monkeypatch):
    model = build(seed=1)
    traced = []
    call = Grugformer.call
    monkeypatch.setattr(Grugformer, "call", lambda *a, **k: traced.append(1) or call(*a, **k))
    before = model.generate([[1, 2, 3]], 6)[0].tolist()
    count = len(traced)
    for variable in model.trainable_variables:
        variable.assign(variable * 0.5)
    after = model.generate([[4, 5]], 7, seed=3)[0].tolist()
    model.generate([[1, 2, 3]], 6)
    assert len(traced) == count or keras.config.backend() == "torch"  # it runs eagerly
    assert after == greedy(model, [4, 5], 7)
    assert before != model.generate([[1, 2, 3]], 6)[0].tolist()


@slow_on_tensorflow
def test_a_quantized_model_generates_as_it_scores():
    model = build(dataclasses.replace(CONFIG, tie_embeddings=True))
    plain = model.generate([[1, 2]], 8)[0].tolist()
    score = model.score([[1, 2, 3]])[0]
    model.token_embedding.enable_lora(2)
    model.blocks[0].mlp.up_proj.quantize("int8")
    model.blocks[1].attention.q_proj.enable_lora(2)
    model.token_embedding.lora_embeddings_b.assign(np.eye(2, 16))
    found = model.generate([[1, 2]], 8)[0].tolist()
    assert found == greedy(model, [1, 2], 8) != plain
    assert np.abs(model.score([[1, 2, 3]])[0] - score).min() > 1e-3


def test_scores_are_the_log_likelihoods_by_definition(model, rng):
    rows = [rng.integers(0, 61, n).tolist() for n in (2, 31, 17, 32)]
    for row, (got, is_greedy) in zip(rows, score_tokens(model, rows), strict=True):
        padded = np.pad(row, (0, 32 - len(row)))[None]
        logits = logits_of(model, padded)[0, : len(row) - 1].astype("float64")
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        want = logits[np.arange(len(row) - 1), row[1:]]
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert is_greedy.tolist() == (logits.argmax(-1) == row[1:]).tolist()
    array = rng.integers(0, 61, (3, 9))
    assert model.score(array).shape == (3, 8)
    assert isinstance(model.score(array.tolist()), list)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, r"prompts must be a list of rows of token ids, got \[\]"),
        ({"prompts": "grug"}, "prompts must be a list of rows of token ids, got 'grug'"),
        ({"prompts": ["grug"]}, r"prompts\[0\] must be a row of token ids, got 'grug'"),
        ({"prompts": [1, 2]}, r"prompts\[0\] must be a row of token ids, got 1"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty: give at least one token"),
        ({"prompts": [[1, 61]]}, r"prompts\[0\] must be in \[0, vocab_size=61\), got 61"),
        ({"prompts": [[-1]]}, r"prompts\[0\] must be in .*, got -1"),
        ({"prompts": [[0.5]]}, r"prompts\[0\] must be a row of integers, got float64"),
        ({"prompts": [[1] * 33]}, r"prompts\[0\] has 33 tokens, more than max_seq_len=32"),
        ({"prompts": [[1] * 30]}, "max_new_tokens=4 after a prompt of 30 tokens .* at most 2 fit"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an int of at least 1, got 0"),
        ({"sampler": "magic"}, "sampler must be one of .*'greedy'.*, got 'magic'"),
        ({"sampler": 3}, "sampler must be a sampler of keras_hub or its name, got 3"),
        ({"stop": 61}, r"stop must be an int in \[0, 60\], got 61"),
        ({"stop": "a"}, "stop must be an int in .* got 'a'"),
        ({"seed": 0.5}, r"seed must be an int in \[0, 2147483647\], got 0.5"),
        ({"seed": -1}, "seed must be an int in .*, got -1"),
        ({"vocab_size": 62}, r"vocab_size must be an int in \[1, 61\], got 62"),
        ({"vocab_size": True}, r"vocab_size must be an int in \[1, 61\], got True"),
        ({"vocab_size": 3, "sampler": "top_k"}, "sampler: k=5 is more than the 3 ids"),
        ({"prompts": np.array(3)}, r"prompts must be a list of rows of token ids, got array\(3\)"),
        ({"prompts": [[1, [2, 3]]]}, r"prompts\[0\] must be a row of integers, got object"),
        ({"max_new_tokens": np.int8(127)}, "max_new_tokens=127 after a prompt of 1 tokens"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(model, arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        model.generate(**{"prompts": [[1]], "max_new_tokens": 4, **arguments})
    assert len(str(raised.value).splitlines()) == 1


def test_what_cannot_be_scored_or_has_no_weights_is_refused(model):
    with pytest.raises(ValueError, match=r"tokens\[1\] has one token"):
        model.score([[1, 2], [1]])
    for method in (lambda m: m.generate([[1]], 2), lambda m: m.score([[1, 2]])):
        with pytest.raises(ValueError, match="has no weights yet"):
            method(Grugformer(CONFIG))
        with pytest.raises(ValueError, match="Cold overrides logits, .*: override head instead"):
            method(build(model_class=Cold))
    import keras_hub

    cold = keras_hub.samplers.TopKSampler(k=2, temperature=0)
    for sampler in (cold, keras_hub.samplers.RandomSampler(temperature=-1.0)):
        with pytest.raises(ValueError, match="temperature must be above 0.*'greedy'"):
            find_sampler(sampler)
    assert type(nucleus(61, 0)).__name__ == "GreedySampler"
    for sampler, message in (
        (keras_hub.samplers.TopKSampler, "must be a sampler of keras_hub or its name"),
        (keras_hub.samplers.ContrastiveSampler(k=2, alpha=0.5), "Contrastive.* has a loop of its"),
        (keras_hub.samplers.BeamSampler(return_all_beams=True), "return_all_beams=True is not"),
    ):
        with pytest.raises(ValueError, match=message):
            find_sampler(sampler)
    with pytest.raises(ValueError, match=r"every must be an int in \[1, 64\], got 0"):
        stream(model, [[1]], 2, every=0)


@pytest.mark.parametrize("offset", [0, 3, (0, 5)])
def test_a_mask_with_an_offset_is_the_rows_of_the_whole_mask(offset):
    mask = ops.AttentionMask(sliding_window=4)
    whole = to_numpy(mask.materialize(9, 9))
    given = np.asarray(offset, "int32") if isinstance(offset, tuple) else offset
    got = to_numpy(dataclasses.replace(mask, query_offset=given).materialize(3, 9))
    starts = np.atleast_1d(offset)
    want = np.stack([whole[start : start + 3] for start in starts])
    np.testing.assert_array_equal(got, want if isinstance(offset, tuple) else want[0])


def test_an_offset_is_the_reference_s_alone_and_is_checked(rng):
    q, kv = (rng.normal(size=(2, n, 2, 8)).astype("float32") for n in (1, 300))
    mask = ops.AttentionMask(query_offset=np.array([5, 299], "int32"))
    got = to_numpy(ops.attention(q, kv, kv, mask))
    for row, end in enumerate((6, 300)):
        want = to_numpy(ops.attention(q[row : row + 1], *[kv[row : row + 1, :end]] * 2))
        np.testing.assert_allclose(got[row], want[0], atol=1e-6)
    with pytest.raises(ValueError, match="'blockwise' does not take a mask with a query_offset"):
        ops.attention(q, kv, kv, mask, implementation="blockwise")
    for wrong in (-1, True, 1.5, np.zeros((2, 2), "int32"), np.zeros(2, "float32")):
        with pytest.raises(ValueError, match="query_offset must be an int of 0 or more"):
            ops.AttentionMask(query_offset=wrong)


def test_stretched_wavelengths_are_those_of_llama_3():
    """Wavelength by wavelength, as the rule of Llama 3.1 reads."""
    scaling = ops.RopeScaling(**STRETCHED)
    frequencies = 10000.0 ** (-np.arange(8) / 8)
    for frequency, got in zip(frequencies, scaling.apply(frequencies), strict=True):
        wavelength = 2 * np.pi / frequency
        if wavelength < 16 / 4:
            want = frequency
        elif wavelength > 16 / 1:
            want = frequency / 8
        else:
            smooth = (16 / wavelength - 1) / (4 - 1)
            want = (1 - smooth) * frequency / 8 + smooth * frequency
        assert got == pytest.approx(want, rel=1e-12)
    np.testing.assert_allclose(ops.RopeScaling(4.0).apply(frequencies), frequencies / 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"factor": 0.5}, "factor must be at least 1, got 0.5"),
        ({"factor": "8"}, "factor must be a positive number, got '8'"),
        ({**STRETCHED, "original_max_seq_len": None}, "original_max_seq_len must be a positive"),
        ({**STRETCHED, "high_freq_factor": 1}, "low_freq_factor must be below high_freq_factor"),
        ({"rope_type": "yarn"}, "rope_scaling must be a RopeScaling, its fields or None"),
    ],
)
def test_wrong_scaling_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, rope_scaling=fields)
