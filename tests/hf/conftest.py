"""These tests need transformers; without it they are not collected."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["*.py"]
