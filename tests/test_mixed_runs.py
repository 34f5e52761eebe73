"""Runs on a mixture of sources: their scores, their epochs, and how they go on."""

import json

import click
from grug_keras.training import artifacts
from grug_keras.training.plots import plot_curve
import pytest

from runs import adamw, at_batch, curve, run_of, sigterm


@pytest.fixture(autouse=True)
def no_sample(monkeypatch):
    """Sampling compiles for seconds."""
    monkeypatch.setattr(artifacts, "sample_validation", lambda *_: {"prompt": "", "text": ""})


@pytest.fixture
def sources(tmp_path):
    """Three sources, as `--data` and `--mixture-at` have them."""
    for name, word in (("a", "grug see tree. "), ("b", "0123456789 "), ("c", "xyzzy ")):
        records = [{"text": f"{i} " + word * (1 + i % 4)} for i in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    return {"data": f"{a}=0.6,{b}=0.4", "mixture_at": (f"7:{a}=0.1,{c}=0.9",)}


def mixed(folder, sources, **options):
    return run_of(folder, packing="best_fit", **sources, **options)


def test_a_run_says_how_it_does_on_each_source(tmp_path, sources, tiny_model, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        artifacts,
        "plot_curve",
        lambda *args, **kwargs: (drawn.update(kwargs), plot_curve(*args, **kwargs)),
    )
    run = mixed(tmp_path / "out", sources, evaluate_every=6)
    assert run(tiny_model, adamw) == 0
    record = run.folder.record()
    assert [evaluation["step"] for evaluation in record["evaluations"]] == [6, 12]
    for evaluation in record["evaluations"]:
        scores = list(evaluation["sources"].values())
        assert len(scores) == 3
        for name in ("loss", "bits_per_byte"):
            values = [score[name] for score in scores]
            assert evaluation[name] == pytest.approx(0.1 * values[0] + 0.9 * values[2])
    assert record["bits_per_byte"] == record["evaluations"][-1]["bits_per_byte"]
    low, high = record["bits_per_byte_interval"]
    assert low < record["bits_per_byte"] < high
    rows = run.train_batches.mixture.counts(48, 4, 0)
    assert rows == pytest.approx([0.6 * 28 + 2, 0.4 * 28, 18], abs=2)
    parts = run.train_batches.batches
    expected = [count / part.num_rows for count, part in zip(rows, parts, strict=True)]
    assert record["epochs"] == pytest.approx(expected, abs=1e-4)
    assert [source["name"][-7:] for source in record["data"]["sources"]] == [
        "a.jsonl",
        "b.jsonl",
        "c.jsonl",
    ]
    assert list(drawn["by_source"].values()) == [
        score["loss"] for score in record["evaluations"][-1]["sources"].values()
    ]
    printed = capsys.readouterr().out
    assert "c.jsonl: 90.0% at the end, " in printed
    assert f"bits per byte (95% {low:.3f} to {high:.3f} over documents)" in printed


def test_a_stopped_run_on_a_mixture_goes_on_to_the_bit(tmp_path, sources, tiny_model):
    whole = mixed(tmp_path / "whole", sources)
    assert whole(tiny_model, adamw) == 0
    for step in (3, 6, 7):  # before and at the change of the mixture, then to the end
        run = mixed(tmp_path / "stopped", sources, resume="")
        at_batch(run.train_batches, step, sigterm)
        assert run(tiny_model, adamw) == 143
    again = mixed(tmp_path / "stopped", sources, resume="")
    assert again.folder.path == run.folder.path
    assert again(tiny_model, adamw) == 0
    assert curve(again.folder.path) == curve(whole.folder.path)
    for name in ("evaluations", "epochs", "tokens"):
        assert again.folder.record()[name] == whole.folder.record()[name]


def test_another_mixture_is_another_run(tmp_path, sources, tiny_model):
    run = mixed(tmp_path / "out", sources)
    at_batch(run.train_batches, 5, sigterm)
    assert run(tiny_model, adamw) == 143
    other = {**sources, "data": sources["data"].replace("0.6", "0.5")}
    with pytest.raises(click.ClickException, match=r"resume: data\.name is .*=0.5.* but .*=0.6"):
        mixed(tmp_path / "out", other, resume=str(run.folder.path))(tiny_model, adamw)
    fresh = mixed(tmp_path / "out", other, resume="")
    assert fresh.folder is None, "a new run begins"
    fresh.past.unlock()
