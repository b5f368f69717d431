"""What may run on a device, and what is known beforehand of its results.

Nothing here runs anything on a device or imports anything above this package.
"""
