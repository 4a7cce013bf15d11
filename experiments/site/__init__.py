"""The static site: README as the front page, the notebooks, and the API from the docstrings."""
