"""``python -m recipes.experiments``: arms trained side by side over seeds, a table of what came out, and its figures."""
