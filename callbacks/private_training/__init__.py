"""How private batches are drawn and counted, and which set-ups are not private."""
