"""What a forward pass leaves in the graph: uses of parameters, calls of losses, where data came from."""
