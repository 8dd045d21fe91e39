"""Every claim of a paper, as a function that measures it here and returns a `Finding`."""

from headwise.study.finding import Finding
from headwise.study.registry import Study, evidence, get, run, studies, study

__all__ = ["Finding", "Study", "evidence", "get", "run", "studies", "study"]
