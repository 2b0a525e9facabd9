"""What a checkpoint must hold so that the resumed run equals the uninterrupted one: place, random numbers, log."""

from lssl.resume.callback import ExactResume
from lssl.resume.place import at_step_boundary

__all__ = ["ExactResume", "at_step_boundary"]
