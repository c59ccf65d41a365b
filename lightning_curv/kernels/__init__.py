"""What exists only for speed: products by the faster library, memory in huge pages, shared results."""
