"""The `paligemma` command; one file for a group of commands."""

from paligemma_jax.cli.main import main as main
