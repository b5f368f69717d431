"""Process of one contender: ``python -m benchmarks.driver NAME``.

Takes one JSON object per line on standard input and answers each with one on standard output;
its contender's client lives here, so that nobody's memory, threads or loops are in another's
figures. Ends with its standard input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from typing import Any

from benchmarks.contenders import CONTENDERS
from benchmarks.contenders.base import Contender, Setup
from benchmarks.measure import perform
from benchmarks.workloads import Workload


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--setup", type=json.loads, default={})
    options = parser.parse_args()
    # Nobody's output may get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender: Contender | None = None
    opened = False
    try:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if contender is None:
                    contender = CONTENDERS[options.contender].make(Setup(**options.setup))
                if not opened:
                    contender.open()
                    opened = True
                answer = _answer(contender, request)
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        if contender is not None and opened:
            contender.close()


def _answer(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    if "workload" not in request:
        return {
            "kinds": sorted(contender.kinds),
            "facts": contender.facts(),
            "processes": contender.processes,
            "restless": contender.restless,
        }
    return {"values": perform(contender, Workload(**request["workload"]), request["turn"])}


if __name__ == "__main__":
    main()
