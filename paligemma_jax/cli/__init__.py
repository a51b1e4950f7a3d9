"""The `paligemma` command; one file a group of commands.

What takes long to import is imported when a command runs, so that help comes at once.
"""

from paligemma_jax.cli.main import main as main
