"""Callbacks: account, summary, trace, monitor, pictures, reports and written embeddings of a run."""

from lssl.callbacks.account import Account
from lssl.callbacks.autosave import AutoSave
from lssl.callbacks.embeddings import EmbeddingWriter
from lssl.callbacks.landmarks import Landmarks
from lssl.callbacks.monitor import RepresentationMonitor
from lssl.callbacks.pace import Pace
from lssl.callbacks.pictures import Pictures
from lssl.callbacks.progress import Progress
from lssl.callbacks.report import Report
from lssl.callbacks.summary import Summary
from lssl.callbacks.trace import Trace
from lssl.callbacks.within_memory import WithinMemory
from lssl.resume import ExactResume

__all__ = [
    "Account",
    "AutoSave",
    "EmbeddingWriter",
    "ExactResume",
    "Landmarks",
    "Pace",
    "Pictures",
    "Progress",
    "Report",
    "RepresentationMonitor",
    "Summary",
    "Trace",
    "WithinMemory",
]
