"""Localizer for documents and scene text: read the lines, rank them for the question, box those that matter."""

from .localizer import OCRLocalizer
from .reader import Page, Reader

__all__ = ["OCRLocalizer", "Page", "Reader"]
