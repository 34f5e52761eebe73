"""Experiments from an idea to the core: start, compare, record, retire and reproduce them.

- `archive`, `archive_check`: the entries of `docs/archive.md`, and the check of what they say.
- `new`, `script`: write a new speedrun script; load one as a module.
- `diff`, `buckets`, `copies`: what a script changes in the core.
- `compare`, `sweep`, `statistics`: each side at its best rate, paired seeds, a verdict; `side` is
  one script with its options, `comparison_summary` the result as text, `merge` joins results.
- `snapshot`, `pool`, `executors`, `child`, `on_ray`: the code that runs, the runs that are there
  already, and where the others are trained.
- `record`, `retire`, `results_file`, `leaderboard`, `stale`: keep the numbers, mark or delete an
  experiment that is done, and say which numbers are of other code.
- `reproduce`: run an experiment again at its own commit.
- `checkout`: the git checkout that all of them work in.
"""
