"""What a run prints: what it is about to do, and how it ended."""

from grug_keras.optimizers import optimizer_table

EXIT_INTERRUPTED, EXIT_DIVERGED = 130, 1


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
    print(optimizer_table(model), flush=True)
    if run.began is not None:
        print(f"continuing after step {step} of {run.folder}", flush=True)


def report(run, record, checkpoints):
    """Prints the outcome.

    Args:
        run: `Run`.
        record: `RunRecord`.
        checkpoints: `Checkpoints`.

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
        return EXIT_INTERRUPTED
    if record.sample is not None:
        print(f"\nsample, continuing {record.sample['prompt']!r}:\n{record.sample['text']}\n")
    left = " and curve" if run.options.results_only else ", curve, picture and checkpoints"
    print(f"results{left}: {run.folder}")
    print(
        f"validation: {record.bits_per_byte:.3f} bits per byte "
        f"(loss {record.loss:.4f}), {record.steps} steps, "
        f"{record.tokens:,} tokens in {record.seconds:.0f} s, "
        f"{record.tokens_per_second or 0:,} tokens/s, {record.total_seconds:.0f} s in all"
    )
    return 0


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
