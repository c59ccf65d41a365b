"""One backward pass inside `curvature(...)` from start to end."""
