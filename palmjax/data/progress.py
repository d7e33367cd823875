"""Progress of a token store being built: documents, tokens and parts."""

from __future__ import annotations

from palmjax import progress


class BuildProgress(progress.Progress):
    """Counts documents and tokens of one store.

    num_documents: how many there will be, if that is known: then the bar and the lines tell the time left.
    """

    def __init__(self, title: str, num_documents: int | None):
        super().__init__(title, num_documents, "documents")
        self._tokens, self._parts = 0, (0, 0)

    def parts(self, done: int, total: int) -> None:
        """Tells how many parts are finished."""
        self._parts = (done, total)
        self.add(0, 0)

    def add(self, documents: int, tokens: int) -> None:
        """Counts documents and tokens that were just written."""
        self._tokens += tokens
        speed = progress.rate(self._tokens / self.seconds)
        done, total = self._parts
        self(self._done + documents, detail=f"{self._tokens:,} tokens ({speed}), part {done}/{total}")
