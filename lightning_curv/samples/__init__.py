"""Which sample owns each row of a tensor: where the batch is, how that is verified, what is refused."""
