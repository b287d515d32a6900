"""Measurements of varcon-loss against what it replaces: ``python -m benchmarks --help``."""
