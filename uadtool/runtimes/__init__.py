"""Detectors that are ready to run: the contract, ``opening.open_model``, and one module per runtime."""
