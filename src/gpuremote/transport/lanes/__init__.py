"""TCP over long ways: several connections for large payloads, and compression.

One connection moves at most its window per round trip. ``setup`` measures the way over the first
connection and opens as many further ones, the lanes, as ``rule`` finds needed; ``connection`` is
what stands in for the first one then.
"""
