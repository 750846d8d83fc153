"""A run or a study as one HTML file that needs nothing else (`run.py`), and a run as a PNG (`curves.py`)."""
