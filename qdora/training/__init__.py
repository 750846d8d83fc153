"""`qdora train`: from a config to a trained adapter. Imports nothing: `resume.py` answers before torch is there."""
