"""What cannot be served is said here, before anything starts: settings that do not go together, keys, names."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from serve.config.identity import provider_of
from serve.config.settings import Config
from serve.errors import ConfigError
from serve.models.checkpoint import default_name
from serve.rollout.webhook import checked_url, signing_key
from serve.telemetry.personal_data import KINDS as PERSONAL_DATA
from serve.vllm_backend.patches.switches import parse, written

# Of a key that is not on loopback alone, at least.
KEY_CHARACTERS = 16


def checked(config: Config) -> Config:
    """The same Config with a name and with keys hashed, or ConfigError."""
    _check_key_lengths(config)
    config = _with_patches(config)
    config = replace(
        config,
        name=config.name or default_name(config.model),
        api_keys=keys_hashed(config.api_keys),
        admin_keys=keys_hashed(config.admin_keys),
        metrics_keys=keys_hashed(config.metrics_keys),
        webhook_secret=_webhook_secret(config),
    )
    for check in (
        _check_numbers,
        _check_patterns,
        _check_addresses,
        _check_combinations,
        _check_fleet,
        _check_access,
        _check_names,
        provider_of,
    ):
        check(config)
    return config


def _with_patches(config: Config) -> Config:
    """The same Config with the kernels that `vllm_patches` leaves."""
    try:
        switches = parse(config.vllm_patches)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for setting, off, kernels in (
        ("cpu_weights", "auto", switches.fused),
        ("speculation", "off", switches.drafts),
    ):
        if (value := getattr(config, setting)) != off and not kernels:
            raise ConfigError(
                f"{setting}={value} needs patches that vllm_patches={written(config.vllm_patches)} leaves out"
            )
    if not switches.kernels:
        return replace(config, lora_kernels="off")
    return replace(config, lora_kernels="layers") if config.lora_kernels == "auto" and not switches.fused else config


def _check_key_lengths(config: Config) -> None:
    """Where others can reach the server, a key must be too long to be guessed."""
    if _loopback(config.host):
        return
    for setting in ("api_keys", "admin_keys", "metrics_keys"):
        for key in getattr(config, setting):
            if len(key) < KEY_CHARACTERS:  # a sha256:HEX is longer
                raise ConfigError(
                    f"a key in {setting} has {len(key)} characters and {config.host} is reachable from other machines: "
                    f"take {KEY_CHARACTERS} or more, as `openssl rand -hex 32` makes them"
                )


def keys_hashed(keys: Iterable[str]) -> tuple[str, ...]:
    """API keys as the sha256 hex digests that are kept; `sha256:HEX` passes as it is."""
    out = []
    for key in keys:
        if not key.startswith("sha256:"):
            out.append(hashlib.sha256(key.encode()).hexdigest())
        elif re.fullmatch(r"sha256:[0-9a-f]{64}", key):
            out.append(key[7:])
        else:
            raise ConfigError("a key that begins with sha256: needs 64 lower-case hex digits behind it")
    return tuple(out)


def _webhook_secret(config: Config) -> str:
    """What signs webhooks, read from its file if there is one."""
    secret = config.webhook_secret
    if config.webhook_secret_file:
        if secret:
            raise ConfigError("webhook_secret and webhook_secret_file are two secrets: give one of them")
        try:
            secret = Path(config.webhook_secret_file).expanduser().read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"webhook_secret_file {config.webhook_secret_file} cannot be read: {error}") from error
    for url in config.webhooks:
        checked_url(url)
    if config.webhooks and len(signing_key(secret)) < KEY_CHARACTERS:
        raise ConfigError(
            f"webhooks are signed: set webhook_secret, or webhook_secret_file, to {KEY_CHARACTERS} characters or more, "
            "as `openssl rand -hex 32` makes them"
        )
    return secret


def _check_numbers(config: Config) -> None:
    if not config.drift_threshold > 1 or config.drift_reference < 20 or config.drift_versions < 1:
        raise ConfigError("drift_threshold takes more than 1, drift_reference 20 or more, drift_versions 1 or more")
    if config.replicas < 1 or config.target_queue <= 0 or config.target_first_token < 0:
        raise ConfigError("replicas takes 1 or more, target_queue more than 0, target_first_token seconds from 0 up")


def _check_patterns(config: Config) -> None:
    for kind in config.personal_data:
        if kind not in PERSONAL_DATA:
            raise ConfigError(f"personal_data takes {', '.join(PERSONAL_DATA)}, not {kind!r}")
    for pattern in config.capture_redact:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"capture_redact takes regular expressions, not {pattern!r}: {error}") from error
    for category in config.moderation_categories:
        if not re.fullmatch(r"[a-z0-9][a-z0-9 /_-]{0,63}", category) or category == "none":
            raise ConfigError(f"moderation_categories takes small letters, digits, spaces and -_/, not {category!r}")
    if not config.moderation_categories or "{text}" not in config.moderation_prompt:
        raise ConfigError("moderation_prompt takes a text with {text} in it, moderation_categories one or more names")
    for digest in config.allowed_digests:
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ConfigError(f"allowed_digests takes 64 lower-case hex digits each, not {digest!r}")


def _check_addresses(config: Config) -> None:
    if config.grafana_url:
        checked_url(config.grafana_url, "grafana_url")


def _check_combinations(config: Config) -> None:
    if not config.ray and (config.replicas > 1 or config.max_replicas > 1):
        raise ConfigError("replicas are Ray's to run: add --ray, or start one server for each machine yourself")
    if config.cpu_weights != "auto" and config.lora_kernels != "auto":
        raise ConfigError(
            f"cpu_weights={config.cpu_weights} goes with lora_kernels=auto alone: only its kernels read such weights"
        )
    if config.speculation != "off" and config.lora_kernels != "auto":
        raise ConfigError(
            f"speculation={config.speculation} goes with lora_kernels=auto alone: drafts are verified in its fused step"
        )
    if config.speculation != "off" and any("speculative_config" in base.engine for base in config.bases):
        raise ConfigError(
            f"speculation={config.speculation} and vLLM's speculative_config do the same: give one of them"
        )
    if config.resolver_folder and not Path(config.resolver_folder).is_dir():
        raise ConfigError(f"resolver_folder takes a folder with adapters in it by name, not {config.resolver_folder}")
    if bool(config.ssl_certfile) != bool(config.ssl_keyfile):
        raise ConfigError("ssl_certfile and ssl_keyfile go together: give both or none")
    _check_front_ends(config)


def _check_front_ends(config: Config) -> None:
    if config.front_ends in ("auto", "1"):
        return
    if config.ray:
        raise ConfigError(
            f"front_ends={config.front_ends} is for a server without Ray, which has its own HTTP: set replicas"
        )
    if config.ssl_certfile:
        raise ConfigError(
            f"front_ends={config.front_ends} cannot send over TLS, whose keys stay in the server: leave ssl_certfile "
            "out and have a proxy in front, or set front_ends to 1"
        )


def _check_fleet(config: Config) -> None:
    """Other servers must find this one."""
    if config.fleet_address:
        address = urlsplit(config.fleet_address)
        if address.scheme not in ("http", "https") or not address.hostname or address.path.strip("/") or address.query:
            raise ConfigError(
                f"fleet_address takes http://HOST:PORT or https://HOST:PORT, not {config.fleet_address!r}"
            )
    if config.fleet != "homes" or config.ray:
        return
    if not config.registry:
        raise ConfigError("fleet=homes is for servers of one registry: set registry to the URL that all of them have")
    if not config.fleet_address and (config.host in ("", "0.0.0.0", "::") or not config.port):
        raise ConfigError(
            f"others cannot reach this server at {config.host}:{config.port}: set fleet_address to where they can, as "
            "http://10.0.0.7:8000"
        )


def _check_access(config: Config) -> None:
    if config.open and not _loopback(config.host):
        raise ConfigError(
            f"{config.host} is reachable from other machines and no key is set: "
            "set LORADOCK_ADMIN_KEYS (and LORADOCK_API_KEYS) or LORADOCK_OIDC_ISSUER, or listen on 127.0.0.1"
        )


def _check_names(config: Config) -> None:
    names = [base.name for base in config.bases]
    for name in names:
        if "@" in name or not name:
            raise ConfigError(f"the base model's name {name!r} must not be empty nor hold @: set --name")
        if names.count(name) > 1:
            raise ConfigError(f"two engines are called {name!r}: give each a `name:` of its own")


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
