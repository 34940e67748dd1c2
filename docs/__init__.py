"""The pages of results, and figures.py, which draws every plot."""
