"""What a data set's lengths say: how much of its batches is padding, and what it costs."""

from padless.lengths.report import LengthsReport, lengths_report

__all__ = ["LengthsReport", "lengths_report"]
