"""`python -m memo_compile` is the `memo` command."""

import sys

from memo_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
