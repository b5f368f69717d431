"""Execution on the server: one backend per kind of device, found by name through the registry.

Backends know arrays and plans; they know nothing of sessions, handles or the wire.
"""
