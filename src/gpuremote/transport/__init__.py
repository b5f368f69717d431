"""Paths between two peers: they move messages and memory, and know neither tensors nor sessions."""
