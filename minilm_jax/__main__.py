"""`python -m minilm_jax` is the command line."""

import sys

from minilm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
