"""Convolutions for a CPU, where XLA's own are slower."""
