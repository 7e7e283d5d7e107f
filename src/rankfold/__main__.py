"""`python -m rankfold`: the command line, for torchrun and accelerate."""

import sys

from rankfold.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
