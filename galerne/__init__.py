"""Galerne: Mistral-style decoders from a PyTorch checkpoint to a running engine.

The parts are `galerne.export`, `galerne.optimize`, `galerne.runtime` and `galerne.targets`; nothing is imported here, so
that a service that only runs bundles pays for nothing else.
"""

__version__ = "0.1.0"
