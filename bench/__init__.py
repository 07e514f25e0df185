"""Benchmarks: scripts and their results, no library code."""
