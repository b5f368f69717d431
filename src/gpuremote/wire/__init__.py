"""The protocol, sans-IO: bytes in, values out, and the other way round.

Nothing here opens a socket, imports NumPy or knows which role this process plays.
"""
