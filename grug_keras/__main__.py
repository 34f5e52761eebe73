"""`python -m grug_keras` does what the command `grug` does."""

from grug_cli import main

main(prog_name="grug")
