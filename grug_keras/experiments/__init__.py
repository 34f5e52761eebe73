"""Experiments from an idea to the core: start, compare, record, retire and reproduce them.

- `archive`, `archive_check`: the entries of `docs/archive.md`, and the check of what they say.
- `new`, `script`: write a new speedrun script; load one as a module.
- `diff`, `buckets`, `copies`: what a script changes in the core.
- `compare`, `statistics`: run A and B with paired seeds, and test the difference.
- `record`, `retire`, `results_file`, `leaderboard`: keep the numbers, and mark or delete an
  experiment that is done.
- `reproduce`: run an experiment again at its own commit.
- `checkout`: the git checkout that all of them work in.
"""
