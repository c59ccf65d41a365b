"""The command `python -m lightning_curv`: see `lightning_curv.callbacks.doctor`."""

from __future__ import annotations

from importlib import import_module

if __name__ == "__main__":
    import_module("lightning_curv.callbacks.doctor").main()
