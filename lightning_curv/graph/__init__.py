"""From a loss tensor to everything that was recorded below it."""
