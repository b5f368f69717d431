"""Process on the other side of a contender: ``python -m benchmarks.peer MODULE``."""

from __future__ import annotations

import argparse
import importlib

from benchmarks.contenders.base import end_with_parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--congestion", default="")
    options = parser.parse_args()
    end_with_parent()
    module = importlib.import_module(f"benchmarks.contenders.{options.module}")
    module.serve(options.congestion, lambda port: print(port, flush=True))


if __name__ == "__main__":
    main()
