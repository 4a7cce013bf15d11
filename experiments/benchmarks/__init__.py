"""Benchmarks: commands that print figures; what they printed is kept in results/."""
