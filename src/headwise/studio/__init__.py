"""Pictures: the HTML report of a scan, one file that needs nothing else."""

from headwise.studio.report import render_report, write_report

__all__ = ["render_report", "write_report"]
