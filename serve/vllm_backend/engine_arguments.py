"""An engine's options, read and checked by vLLM's own parser."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.version import __version__ as VLLM_VERSION

from serve.errors import ConfigError
from serve.vllm_backend.patches import media
from serve.vllm_backend.patches.error_translation import sentence

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
except ImportError:  # since vLLM 0.33
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"vLLM does not take these options: {message}")


def parse(model: str, name: str, options: Mapping[str, Any]) -> argparse.Namespace:
    """vLLM's own namespace for these options, checked by vLLM's own parser."""
    try:
        parser = make_arg_parser(_Parser(prog="loradock serve"))
    except RuntimeError as error:  # of a driver without its libraries
        raise ConfigError(f"vLLM finds no device here ({sentence(error)}): does `nvidia-smi` list a GPU?") from error
    actions = {action.dest: action for action in parser._actions}
    words = ["--model", model, "--served-model-name", name, "--enable-lora"]
    words += ["--worker-extension-cls", "serve.vllm_backend.worker_extension.Worker"]
    for option, value in options.items():
        if option not in actions:
            near = difflib.get_close_matches(option, actions, n=1)
            raise ConfigError(f"{option} is not an option of vLLM {VLLM_VERSION}" + (f"; {near[0]} is" if near else ""))
        words += _words(actions[option], value)
    try:
        args = parser.parse_args(words)
        validate_parsed_serve_args(args)
        if args.tool_call_parser and not args.tool_parser_plugin:
            ToolParserManager.get_tool_parser(args.tool_call_parser)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"vLLM does not take these options: {sentence(error)}") from error
    args.enable_scale_out = True  # /inference/v1/generate; the gateway lets nothing else of it through
    args.allowed_media_domains = media.allowed_hosts(args.allowed_media_domains)
    return args


def _words(action: argparse.Action, value: Any) -> list[str]:
    """An option and its value as the command line would spell them."""
    flag = action.option_strings[0]
    if action.nargs == 0:  # a switch: argparse's BooleanOptionalAction or store_true
        on = str(value).lower()
        if on not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
            raise ConfigError(f"{action.dest} takes true or false, not {value!r}")
        if on in ("true", "1", "yes", "on"):
            return [flag]
        return [no[0]] if (no := [o for o in action.option_strings if o.startswith("--no-")]) else []
    if isinstance(value, (dict, list)) and action.nargs not in ("+", "*"):
        return [flag, json.dumps(value)]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, *str(value).split(",")] if action.nargs in ("+", "*") else [f"{flag}={value}"]
