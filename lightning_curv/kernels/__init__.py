"""What exists only for speed: products by the faster library, huge pages, shared results."""
