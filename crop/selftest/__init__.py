"""Operator cases with their expected results, and timers: what checks and times an installed build.

Imports torch, ``crop.ops`` and ``crop.geometry`` alone, so that it works from a wheel.
"""
