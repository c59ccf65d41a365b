"""Private steps: clipped sums, noise, the account, and audits of them."""
