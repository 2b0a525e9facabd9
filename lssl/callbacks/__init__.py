"""Callbacks: what a run shows of itself."""

from lssl.callbacks.report import Report

__all__ = ["Report"]
