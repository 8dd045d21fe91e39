"""A paper, as every question, method and study cites it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """The exact title of a paper and its arXiv id ("" for the few that have none)."""

    title: str
    arxiv: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""
