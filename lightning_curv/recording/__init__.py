"""What a forward pass leaves in the graph: uses of parameters, calls of losses, origins of data."""
