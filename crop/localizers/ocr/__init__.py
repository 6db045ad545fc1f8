"""Localizer for documents and scene text: read the lines, rank them for the question, box those that matter."""

from crop.localizers.ocr.localizer import OCRLocalizer
from crop.localizers.ocr.reader import Page, Reader

__all__ = ["OCRLocalizer", "Page", "Reader"]
