"""Entry point of python -m lorafast.bench, which is the same as lorafast-bench."""

import sys

from lorafast.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
