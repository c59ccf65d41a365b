"""How far to go along a direction, and how much to damp."""
