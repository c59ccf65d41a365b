"""From one batch to logged numbers: observed, measured, completed after the step, published."""
