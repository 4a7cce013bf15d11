"""Processes that train together: how they find each other, act as one, and notice who is gone."""
