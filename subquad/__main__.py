"""`python -m subquad COMMAND ...`, the same as `subquad COMMAND ...`; what torchrun starts."""

import os
import sys

if __name__ == "__main__":
    # -m puts the current folder first. In a checkout that would make kernels/ and models/ names of the top level, and
    # transformers takes ours for Hugging Face's package of that name.
    if sys.path and sys.path[0] == os.getcwd():
        del sys.path[0]
    from subquad.cli import main

    sys.exit(main())
