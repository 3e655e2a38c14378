"""python -m lorafast.bench: the same as lorafast-bench."""

import sys

from lorafast.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
