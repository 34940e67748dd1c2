"""Measurements: the papers' claims, speed beside other packages, cost at scale. `python -m benchmarks.NAME`"""
