"""What tests of pools need: stress, faults, task orders, checks, simulated load.

Nothing of it is imported by the pool itself.
"""

# Tracebacks, pickles and documentation show the public names.
_public: object
for _public in list(globals().values()):
    if getattr(_public, "__module__", "").startswith("trio_pool.testing._"):
        _public.__module__ = __name__
