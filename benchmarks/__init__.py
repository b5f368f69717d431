"""Every workload with every contender, interleaved in one run: ``python -m benchmarks``.

Only ratios inside one run mean something; the figures themselves are the machine's.
"""
