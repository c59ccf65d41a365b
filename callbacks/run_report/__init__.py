"""The page that tells of a whole run: series, a map of the layers, findings in words."""
