"""`python -m paligemma_jax`: the command line without its script on the PATH."""

import sys

from paligemma_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
