"""Which columns are backpropagated."""

from lightning_curv.passes.passes import Column, Passes


def watched_columns(monkeypatch) -> list[Column]:
    """The columns that enter the graph from now on, in a list that grows."""
    columns, jacobians = [], Passes.jacobians

    def noted(given):
        for column in given:
            columns.append(column)
            yield column

    monkeypatch.setattr(Passes, "jacobians", lambda self, given: jacobians(self, noted(given)))
    return columns
