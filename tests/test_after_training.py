"""What a run shows and sends: its sample, its pictures, its numbers elsewhere."""

import csv
import dataclasses
import math
import sys
import types
import warnings

import grug_keras
from grug_keras.experiments.sweep import Sweep, draw
from grug_keras.training import plots, sinks
from grug_keras.training.provenance import device
from grug_keras.training.sampling import generate, sample_validation
import keras
import numpy as np
import pytest


class Letters:
    """A tokenizer of six characters and a document start."""

    bos_id, vocab_size, letters = 6, 7, b"ACGTN\n"

    def encode(self, text):
        return [self.letters.index(byte) for byte in text]

    def decode(self, tokens, starts=True):
        return bytes(self.letters[token] for token in tokens)


class Prefixed:
    """Byte fallback with a prefix space of three bytes: more tokens than bytes, as Llama 2 has."""

    bos_id, vocab_size = 256, 257

    def encode(self, text):
        return list((" " + text.decode()).replace(" ", "▁").encode())

    def decode(self, tokens, starts=True):
        return (
            bytes(map(int, tokens))
            .decode(errors="replace")
            .replace("▁", " ")
            .removeprefix(" ")
            .encode()
        )


@pytest.fixture(scope="module")
def model(tiny_config):
    sizes = {"vocab_size": 257, "max_seq_len": 32, "num_layers": 1}
    model = grug_keras.Grugformer(dataclasses.replace(tiny_config, **sizes))
    model.build()
    return model


def data_of(tokenizer, text):
    validation = np.array([tokenizer.bos_id, *tokenizer.encode(text)] * 3)
    return types.SimpleNamespace(tokenizer=tokenizer, validation=validation)


def test_a_vocabulary_of_seven_is_sampled(model):
    sample = sample_validation(model, data_of(Letters(), b"ACGT" * 9), seed=0)
    assert sample["prompt"] == "ACGTACG"
    assert set(sample["text"]) <= set("ACGTN\n")


@pytest.mark.parametrize("text", [b"xyz " * 50, b"    " * 50, b"x"])
def test_a_prompt_of_more_tokens_than_bytes_fits(model, text):
    tokenizer = Prefixed()
    assert len(tokenizer.encode(text)) > len(text)
    prompt = sample_validation(model, data_of(tokenizer, text), seed=0)["prompt"].encode()
    assert text.startswith(prompt)
    assert len(tokenizer.encode(prompt)) <= 7


def test_no_temperature_is_greedy_and_a_negative_one_is_refused(model):
    found = generate(model, Letters(), b"ACGTACG", length=24, temperature=0)
    tokens = np.array([[6, *Letters().encode(b"ACGTACG"), *[0] * 24]], "int32")
    for end in range(8, 32):
        logits = keras.ops.convert_to_numpy(model.logits(tokens))
        tokens[0, end] = np.argmax(logits[0, end - 1, :7])
    likeliest = list(tokens[0, 8:])
    likeliest = likeliest[: likeliest.index(6)] if 6 in likeliest else likeliest
    assert found == Letters().decode(likeliest)
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"temperature must be 0 or more, got {wrong}"):
            generate(model, Letters(), temperature=wrong)


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "_a $x^$ 日 run"
    folder.mkdir()
    with open(folder / "curve.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "tokens", "seconds", "loss"])
        writer.writerows([[i, i * 8, i / 2, 5 - i / 10] for i in range(1, 20)])
    return folder


@pytest.mark.jax
def test_names_are_drawn_as_they_are(run_folder, monkeypatch):
    """Two dollars begin no formula, and a character that the font lacks is no warning."""
    title = "on data/$x^$/caf\udce9 日"
    texts = []

    def save(figure, path, dpi=150):
        texts.extend(text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text")))
        original(figure, path, dpi)

    original = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", save)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.plot_curve(run_folder / "curve.csv", run_folder / "a.png", title=title)
        plots.plot_runs([run_folder], run_folder / "b.svg")
        found = Sweep("learning_rate", {0.1: [2.0], 0.2: [1.0], 0.4: [2.0]}, 0.2)
        draw(found, run_folder / "c.png", title)
    assert r"on data/\$x^\$/caf\udce9 日" in texts
    assert r" _a \$x^\$ 日 run" in texts, "a label that begins with _ is left out of a legend"
    assert "x^" in (run_folder / "b.svg").read_text(encoding="utf-8")


class Failing:
    """A sink whose connection goes."""

    def __init__(self, folder, record):
        self.calls = []

    def log(self, step, values):
        self.calls.append(step)
        if step == 2:
            raise ConnectionError("socket closed\nand more")

    def close(self):
        self.calls.append("close")
        raise BrokenPipeError("gone")


@pytest.mark.jax
def test_a_sink_that_fails_is_said_once_and_left(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sinks.SINKS, "wandb", Failing)
    (sink,) = sinks.open_sinks(["wandb"], tmp_path, {"id": "a"})
    failing = sink._sink
    for step in range(1, 5):
        sink.log(step, {})
    sink.close()
    assert failing.calls == [1, 2]
    what = "ConnectionError: socket closed"
    assert caplog.messages == [f"log=wandb failed and gets no more numbers: {what}"]
    (sink,) = sinks.open_sinks(["wandb"], tmp_path, {"id": "a"})
    sink.close()
    assert caplog.messages[1:] == [
        "log=wandb failed and gets no more numbers: BrokenPipeError: gone"
    ]


@pytest.mark.jax
def test_a_sink_that_cannot_begin_is_named(monkeypatch, tmp_path):
    def no_network(folder, record):
        raise TimeoutError("no network\nat all")

    monkeypatch.setitem(sinks.SINKS, "wandb", no_network)
    with pytest.raises(ValueError, match="^log=wandb cannot begin: TimeoutError: no network$"):
        sinks.open_sinks(["wandb"], tmp_path, {"id": "a"})


@pytest.fixture
def wandb(monkeypatch):
    """A W&B of which nothing but its answers is known."""
    module = types.SimpleNamespace(Error=type("Error", (Exception,), {}), mode="online")
    settings = types.SimpleNamespace(settings=module)
    module.setup, module.inits = (lambda: settings), []
    module.init = lambda **arguments: module.inits.append(arguments)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.mark.jax
def test_wandb_without_a_login_is_refused_unless_it_is_offline(wandb):
    def login():
        raise wandb.Error("No API key configured. Use `wandb login` to log in.\nmore")

    wandb.login = login
    line = "log=wandb: No API key configured. Use `wandb login` to log in. WANDB_MODE=offline needs"
    with pytest.raises(ValueError, match=f"^{line} none$"):
        sinks.WandB.require()
    wandb.mode = "offline"
    sinks.WandB.require()


@pytest.mark.jax
def test_wandb_gets_what_one_filters_by(wandb, tmp_path):
    record = dict.fromkeys(sinks._CONFIG) | {"id": "a-1", "experiment": "a", "loss": None}
    sinks.WandB(tmp_path, {**record, "size": "smoke", "backend": "jax", "recipe": {"steps": 4}})
    (arguments,) = wandb.inits
    assert arguments["config"]["recipe"] == {"steps": 4}
    assert "loss" not in arguments["config"]
    assert (arguments["name"], arguments["group"]) == ("a-1", "a")
    assert arguments["tags"] == ["smoke", "jax"]


@pytest.mark.jax
def test_a_real_wandb_without_a_login_is_refused(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="the test extra brings it")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ValueError, match="^log=wandb: .*WANDB_MODE=offline needs none$"):
        sinks.WandB.require()


@pytest.mark.jax
def test_devices_have_their_own_names(monkeypatch):
    gpu = types.SimpleNamespace(name="/physical_device:GPU:0")
    details = types.SimpleNamespace(get_device_details=lambda gpu: {"device_name": "NVIDIA H200"})
    config = types.SimpleNamespace(list_physical_devices=lambda kind: [gpu], experimental=details)
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(config=config))
    monkeypatch.setattr(keras.config, "backend", lambda: "tensorflow")
    assert device()["kind"] == "NVIDIA H200"
    torch = types.SimpleNamespace(
        cuda=types.SimpleNamespace(device_count=lambda: 0),
        backends=types.SimpleNamespace(mps=types.SimpleNamespace(is_available=lambda: True)),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    assert (device()["kind"], device()["count"]) == ("mps", 1)
