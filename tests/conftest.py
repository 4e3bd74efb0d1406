"""Settings of every test: quiet libraries, no network."""

from __future__ import annotations

import os

# Before any test imports them: nothing here is fetched, and what is missing must fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
# Graphs run by their function bodies, whatever is built here, but where a test names the library.
os.environ.setdefault("ARROWHEAD_ORT_LIBRARY", "")
