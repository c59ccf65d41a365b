"""`python -m lightning_curv doctor MODULE:CLASS`: versions, and what `CurvatureCallback` logs for a model."""

from importlib import import_module

if __name__ == "__main__":
    import_module("lightning_curv.callbacks.doctor").main()
