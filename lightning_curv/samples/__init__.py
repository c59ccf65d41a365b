"""Which sample owns each row of a tensor: how that is told, how verified, what is refused."""
