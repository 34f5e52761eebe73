"""Exported programs compute the model's logits, or nothing is written; saved models come back.

The programs are run by the runtimes that they are for, not by Keras.
"""

import dataclasses
import operator
import os
import pathlib
import subprocess
import sys
import types

from grug_keras import Block, CausalSelfAttention, GrugConfig, ops
from grug_keras.export import FORMATS, export_keras, export_model
from grug_keras.export.formats import Format, find_format
from grug_keras.export.logits_model import logits_model, plain
from grug_keras.ops import attention_dispatch
from grug_keras.ops.attention_reference import reference_attention
import keras
from models import seeded_model
import numpy as np
import pytest
import saved_models

BACKEND = keras.config.backend()
HERE = [name for name, kind in FORMATS.items() if BACKEND in kind.needs]
CONFIG = GrugConfig(
    61,
    16,
    24,
    2,
    4,
    2,
    max_seq_len=300,
    qk_norm=True,
    initializer_std=0.3,
    sliding_window=(4, None),
)
IDS = np.random.default_rng(0).integers(0, 61, (3, 11)).astype("int32")
LONG = np.random.default_rng(1).integers(0, 61, (1, 300)).astype("int32")
to_numpy = keras.ops.convert_to_numpy


def make(config=CONFIG, **options):
    return seeded_model(config, **options)


@pytest.fixture(scope="module")
def model():
    return make()


# ------------------------------------------------------------------------- what is traced


def chosen():
    """The attention of a call that is long enough for a kernel."""
    x = np.zeros((1, 300, 2, 4), "float32")
    return attention_dispatch.choose(x, x, x, ops.AttentionMask(), None, None)


def test_attention_is_the_reference_without_kernels():
    kernel = chosen()
    with ops.without_kernels():
        assert chosen() is reference_attention
        with pytest.raises(ZeroDivisionError), ops.without_kernels():
            raise ZeroDivisionError
        assert chosen() is reference_attention, "until the outermost ends"
    assert chosen() is kernel is not reference_attention


@pytest.mark.jax
def test_a_trace_holds_no_kernel(model):
    """The kernels are loops over blocks of keys."""
    import jax

    def loops():
        text = str(jax.make_jaxpr(lambda ids: model.logits(ids))(LONG))
        return [word for word in ("scan[", "while[", "custom_vjp", "pallas_call") if word in text]

    assert loops()
    with ops.without_kernels():
        assert not loops()


class ScaledAttention(CausalSelfAttention):
    """A change that its script has not registered."""

    def build(self, input_shape):
        super().build(input_shape)
        self.gain = self.add_weight(name="gain", shape=(self.num_heads, 1), initializer="normal")

    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask) * (1 + keras.ops.cast(self.gain, v.dtype))


class ScaledBlock(Block):
    attention_class = ScaledAttention


def test_what_is_exported_computes_in_float32_and_once():
    """The same weights, LoRA's merged, also of a block that no script has registered."""
    config = dataclasses.replace(CONFIG, remat="full")
    model = make(config, block_class=ScaledBlock, dtype="mixed_bfloat16")
    copy = plain(saved_models.add_lora(model))
    assert (copy.compute_dtype, copy.config.remat) == ("float32", "none")
    assert (model.compute_dtype, model.config.remat) == ("bfloat16", "full")
    for name in ("attention.v_proj.kernel", "attention.q_proj.kernel", "attention.gain"):
        merged, found = (operator.attrgetter(name)(m.blocks[0]) for m in (model, copy))
        np.testing.assert_allclose(to_numpy(found), to_numpy(merged), rtol=1e-6, atol=1e-7)
    assert plain(copy) is copy, "no copy without need"


# ----------------------------------------------------------------------- nothing half-written


@pytest.fixture
def pretended(monkeypatch):
    """A format `"pretended"`, whose programs compute what a list of functions says."""
    steps = types.SimpleNamespace(write=lambda path: path.write_text("x"), run=None, written=[])

    def write(model, path, shape, **options):
        steps.written.append((shape, options))
        steps.model = model
        steps.write(path)

    def read(path):
        assert path.exists()
        return lambda ids: steps.run(to_numpy(steps.model(ids)))

    kind = Format("model.pretended", {BACKEND: ()}, write, read)
    monkeypatch.setitem(FORMATS, "pretended", kind)
    return steps


def test_a_right_program_gets_its_name(model, pretended, tmp_path):
    pretended.run = lambda logits: logits
    out = export_keras(types.SimpleNamespace(model=model), tmp_path / "out", "pretended")
    assert [out] == list((tmp_path / "out").iterdir())
    path = tmp_path / "some.pretended"
    model.export(path, "pretended", input_signature=[keras.InputSpec(shape=(2, 5), dtype="int32")])
    model.export(str(tmp_path / "other.pretended"), format="pretended", verbose=False, speed=3)
    assert pretended.written == [((None, None), {}), ((2, 5), {}), ((None, None), {"speed": 3})]
    names = ["other.pretended", "out", "some.pretended"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda logits: logits + 2e-4, "differs from the model by 0.0002"),
        (lambda logits: logits * np.nan, "differs from the model by nan"),
        (lambda logits: logits[:, :-1], r"gives \(\d+, \d+, 61\) for logits of"),
    ],
)
def test_a_wrong_program_is_an_error_and_is_not_left(model, pretended, tmp_path, run, message):
    pretended.run = run
    for export in (
        lambda: export_keras(types.SimpleNamespace(model=model), tmp_path / "out", "pretended"),
        lambda: model.export(tmp_path / "x.pretended", "pretended"),
    ):
        with pytest.raises(ValueError, match=message):
            export()
        assert not list(tmp_path.iterdir())


def test_an_export_that_fails_leaves_nothing(model, pretended, tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    pretended.write = fail
    with pytest.raises(OSError, match="disk full"):
        export_keras(types.SimpleNamespace(model=model), tmp_path / "out", "pretended")
    with pytest.raises(OSError, match="disk full"):
        export_model(model, tmp_path / "x.pretended", "pretended")
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_named_before_any_work(model, pretended, tmp_path):
    path = tmp_path / "x.pretended"
    for options, message in (
        ({"format": "gguf"}, r"format must be one of \['saved_model', 'onnx', .* got 'gguf'"),
        ({"filepath": tmp_path / "x.txt"}, "filepath must end with .pretended"),
        ({"input_signature": []}, r"input_signature must be .* got \[\]"),
        ({"input_signature": [IDS, IDS]}, "input_signature must be"),
        ({"input_signature": [keras.InputSpec(shape=(None, 3))]}, "input_signature must be"),
        ({"input_signature": [keras.InputSpec("int32", (1, 301))]}, "at most max_seq_len=300"),
    ):
        with pytest.raises(ValueError, match=message):
            model.export(**{"filepath": path, "format": "pretended", **options})
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"filepath='.*' is there already"):
        model.export(path, "pretended")
    with pytest.raises(ValueError, match=r"out='.*' is there already"):
        export_keras(types.SimpleNamespace(model=model), tmp_path, "pretended")
    assert (path.read_text(), pretended.written) == ("mine", [])


@pytest.mark.parametrize("name", ["tf_saved_model", *FORMATS])
def test_the_answer_to_a_format_is_a_backend_that_has_it(name, monkeypatch):
    needs = FORMATS[name.removeprefix("tf_")].needs
    if BACKEND in needs:
        assert find_format(name).needs is needs
        monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
        for package in needs[BACKEND][:1]:
            message = f"format='{name}' needs {package}, which is not installed: pip install"
            with pytest.raises(ValueError, match=message):
                find_format(name)
    else:
        message = f"format='{name}' needs KERAS_BACKEND={' or '.join(needs)}, this is {BACKEND}: a"
        with pytest.raises(ValueError, match=message):
            find_format(name)


def test_what_no_program_can_be_made_of_is_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(keras.distribution, "distribution", lambda: "a mesh")
        with pytest.raises(ValueError, match="export needs a model without a mesh.* got 'a mesh'"):
            logits_model(make())
    model = saved_models.quantize(make())
    with pytest.raises(ValueError, match="export needs float weights: .*/block_0/.*_proj is int8"):
        logits_model(model)


# --------------------------------------------------------------------------- real programs


def run_saved_model(folder):
    import tensorflow as tf

    program = tf.saved_model.load(str(folder))
    (output,) = program.signatures["serving_default"].structured_outputs
    served = program.signatures["serving_default"](token_ids=tf.constant(IDS))[output]
    np.testing.assert_array_equal(served, program.serve(IDS))
    # JAX's program holds what other platforms would run.
    text = (folder / "saved_model.pb").read_bytes()
    assert not [word for word in (b"tpu_custom_call", b"cudnn", b"Sharding") if word in text]
    return lambda ids: program.serve(ids).numpy()


def run_onnx(folder):
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, output.type) == ("token_ids", "tensor(int32)", "tensor(float)")
    return lambda ids: session.run(None, {"token_ids": ids})[0]


def run_litert(folder):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(folder / "model.tflite"))

    def run(ids):
        given, output = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
        interpreter.resize_tensor_input(given["index"], ids.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], ids)
        interpreter.invoke()
        return interpreter.get_tensor(output["index"])

    return run


def run_torch(folder):
    import torch

    program = torch.export.load(folder / "model.pt2").module()
    return lambda ids: program(torch.from_numpy(ids)).numpy(force=True)


RUN = {
    "saved_model": run_saved_model,
    "onnx": run_onnx,
    "litert": run_litert,
    "torch": run_torch,
}


def tied():
    """Tied embeddings, and Llama 3's rotary frequencies."""
    scaling = ops.RopeScaling(8.0, 1.0, 4.0, 64)
    fields = {"num_layers": 2, "sliding_window": (4, None), "rope_scaling": scaling}
    return make(dataclasses.replace(CONFIG, tie_embeddings=True, **fields))


def changed():
    """A block of one's own, LoRA and recomputation."""
    config = dataclasses.replace(CONFIG, num_layers=2, remat="full")
    return saved_models.add_lora(make(config, block_class=ScaledBlock))


@pytest.mark.slow
@pytest.mark.parametrize("build", [tied, changed])
@pytest.mark.parametrize("name", HERE)
def test_its_own_runtime_gets_the_logits_of_the_model(name, build, tmp_path):
    """Real converters and real runtimes: 2 to 20 s each. Any batch, any length up to the longest.

    The fast tests pretend both.
    """
    model = build()
    trained = types.SimpleNamespace(model=model)
    export_keras(trained, tmp_path / "out", name)
    run = RUN[name](tmp_path / "out")
    for ids in (IDS, IDS[:1, :1], LONG, LONG[:, :257]):
        expected = to_numpy(model.logits(ids))
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(run(ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_a_program_of_one_shape(name, model, tmp_path):
    """By `model.export`, as runtimes without dynamic shapes need it, from a real converter."""
    path = tmp_path / "out" / FORMATS[name].file
    if FORMATS[name].file:
        path.parent.mkdir()
    model.export(path, name, input_signature=[keras.InputSpec(shape=IDS.shape, dtype="int32")])
    found = RUN[name](tmp_path / "out")(IDS)
    np.testing.assert_allclose(found, to_numpy(model.logits(IDS)), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------ .keras files


@pytest.mark.parametrize("kind", ["tied", "lora", "int8"])
def test_a_saved_model_comes_back(kind, tmp_path):
    """Also a quantized one, whose layers hold other variables than those that `build` makes."""
    saved_models.write(tmp_path, [kind])
    assert saved_models.errors(tmp_path, [kind]) == {
        f"{kind}.keras": 0.0,
        f"{kind}.weights.h5": 0.0,
    }


BACKENDS = ("jax", "tensorflow", "torch")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders of saved models by the backend that wrote them."""
    folders = {}
    for backend in BACKENDS:
        folders[backend] = tmp_path_factory.mktemp(backend)
        run_script(backend, "write", folders[backend])
    return folders


def run_script(backend, *arguments):
    script = pathlib.Path(saved_models.__file__)
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.jax
@pytest.mark.parametrize("reader", BACKENDS)
def test_a_saved_model_comes_to_every_backend(written, reader):
    """A process of each backend reads what the two others wrote; in one process there is one."""
    run_script(reader, "check", *(written[writer] for writer in BACKENDS if writer != reader))
