"""Backward passes through the graph of one loss, and what is heard of the user's own."""
