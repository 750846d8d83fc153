"""Deliberate faults of the product, each of which a test of the default tier must catch; `__main__.py` applies them."""
