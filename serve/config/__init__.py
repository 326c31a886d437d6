"""What the server was asked to be: one frozen Config, from its defaults, a file, the environment and the command line.

Nothing else reads settings from files or the environment; nothing here starts or opens anything.
"""

from serve.config.checks import keys_hashed
from serve.config.engine_options import ADAPTERS, REFUSED, engine_options, kv_cache, whole
from serve.config.settings import SETTINGS, Base, Config, Setting, settings, settings_help
from serve.config.sources import load
from serve.config.values import size

__all__ = [
    "ADAPTERS",
    "REFUSED",
    "SETTINGS",
    "Base",
    "Config",
    "Setting",
    "engine_options",
    "keys_hashed",
    "kv_cache",
    "load",
    "settings",
    "settings_help",
    "size",
    "whole",
]
