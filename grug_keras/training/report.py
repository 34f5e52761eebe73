"""What a run prints: what it is about to do, and how it ended."""

from grug_keras.optimizers import optimizer_table
from grug_keras.training.branch import plateau_end
from grug_keras.training.segments import changed_since

EXIT_DIVERGED = EXIT_INCOMPLETE = 1


def announce(run, model, record, step):
    """Prints model, data and optimizer before training.

    Args:
        run: `Run`.
        model: built and compiled.
        record: `RunRecord`.
        step: int, number of steps that are done already.
    """
    data = record.data
    print(
        f"{record.experiment}: {record.parameters / 1e6:.2f}M parameters, "
        f"{run.recipe.steps} steps of {run.recipe.batch_size} x {run.config.max_seq_len} "
        f"tokens of {data['name']} ({data['train_tokens'] / 1e6:.1f}M, "
        f"sha256 {data['sha256'][:12]})",
        flush=True,
    )
    if record.init is not None:
        print(
            f"first weights and shape: {record.init['name']}, sha256 {record.init['sha256'][:12]}; "
            f"the recipe is that of --size {record.size}",
            flush=True,
        )
    print(optimizer_table(model), flush=True)
    if run.past.began is not None:
        print(f"continuing after step {step} of {run.folder}", flush=True)
        changes = changed_since(run.past.began, record.as_dict())
        if changes:
            print(f"what it runs with has changed: {'; '.join(changes)}", flush=True)
        _announce_length(run, step)
    elif run.past.origin is not None:
        print(f"branching after step {step} of {run.past.origin['folder']}", flush=True)


def _announce_length(run, step):
    """Says so when a longer schedule raises the rate again."""
    before = run.past.began["recipe"]
    end = plateau_end(before)
    if run.past.gets_longer and step > end:
        print(
            f"the learning rate rises again: step {step} is in the cool-down of the "
            f"{before['steps']} steps before, which began after step {end}; a checkpoint from "
            "before it can be branched from (--branch)",
            flush=True,
        )


def report(run, record, checkpoints, stopped_with):
    """Prints the outcome.

    Args:
        run: `Run`.
        record: `RunRecord`.
        checkpoints: `Checkpoints`.
        stopped_with: int, exit status of a run that a signal has stopped.

    Returns:
        int, exit status.
    """
    if record.status == "diverged":
        _report_divergence(run, record, checkpoints.steps())
        return EXIT_DIVERGED
    if record.status == "interrupted":
        print(
            f"interrupted after step {record.steps}; checkpoint and results in "
            f"{run.folder}; --resume continues"
        )
        return stopped_with
    if record.sample is not None:
        print(f"\nsample, continuing {record.sample['prompt']!r}:\n{record.sample['text']}\n")
    _report_sources(run, record)
    left = " and curve" if run.options.results_only else ", curve, picture and checkpoints"
    print(f"results{left}: {run.folder}")
    print(
        f"validation: {record.bits_per_byte:.3f} bits per byte{_interval(record)}, "
        f"loss {record.loss:.4f}, {record.steps} steps, "
        f"{record.tokens:,} tokens in {record.seconds:.0f} s, "
        f"{record.tokens_per_second or 0:,} tokens/s, {record.total_seconds:.0f} s in all"
    )
    if record.error is not None:
        print(f"{record.error}; --resume {run.folder} tries again, from the last checkpoint")
        return EXIT_INCOMPLETE
    return 0


def _interval(record):
    if record.bits_per_byte_interval is None:
        return ""
    low, high = record.bits_per_byte_interval
    return f" (95% {low:.3f} to {high:.3f} over documents)"


def _report_sources(run, record):
    """Prints share, epochs and score of each source of a mixture."""
    scores = record.evaluations[-1].get("sources", {})
    for name, epochs, weight in zip(scores, record.epochs, run.data.weights, strict=False):
        print(
            f"  {name}: {weight:.1%} at the end, {epochs:.2f} epochs, "
            f"{scores[name]['bits_per_byte']:.3f} bits per byte"
        )


def _report_divergence(run, record, kept):
    """Names the step, its documents and the last good checkpoint."""
    good = f"the last good checkpoint is of step {kept[-1]}" if kept else "no checkpoint"
    what = f"weights after step {record.steps} are"
    if record.bad_step is not None:
        what = f"loss of step {record.bad_step + 1} is"
    print(f"diverged: the {what} not finite; {good}, in {run.folder}")
    if record.bad_step is not None:
        documents = run.train_batches.documents(record.bad_step)
        shown = ", ".join(map(str, documents[:20])) + (", ..." if documents[20:] else "")
        print(f"its batch holds training documents {shown}")
