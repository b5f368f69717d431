"""``python -m gpuremote``."""

import sys

from gpuremote.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
