"""From idea to canonical: the archive, A/B tests, and what becomes of an experiment."""
