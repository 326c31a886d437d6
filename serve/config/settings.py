"""The settings: name, type with its bounds, default and help of each."""

import os
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from msgspec import Meta

from serve.config.groups import COMMON, GROUPS, group_of
from serve.config.values import takes
from serve.rollout.policy import DEFAULT_POLICIES, Policy
from serve.telemetry.personal_data import KINDS as PERSONAL_DATA
from serve.telemetry.prices import Price
from serve.telemetry.slo import DEFAULT_SLOS, Slo
from serve.telemetry.tracing.tracing_settings import TracingSettings

Port = Annotated[int, Meta(ge=0, le=65535, description="0 to 65535")]
Seconds = Annotated[float, Meta(ge=0, le=sys.float_info.max, description="seconds from 0 up")]
FromZero = Annotated[float, Meta(ge=0, le=sys.float_info.max, description="a number from 0 up")]
FromOne = Annotated[int, Meta(ge=1, description="a whole number from 1 up")]
WholeFromZero = Annotated[int, Meta(ge=0, description="a whole number from 0 up")]
Portion = Annotated[float, Meta(ge=0, le=1, description="a share from 0 to 1")]
AutoOrSeconds = Annotated[
    str,
    Meta(
        pattern=r"^(auto|([0-9]+\.?|[0-9]*\.[0-9]+)([eE][+-]?[0-9]{1,2})?)$", description="auto, or seconds from 0 up"
    ),
]
AutoOrCount = Annotated[str, Meta(pattern=r"^(auto|[1-9][0-9]?)$", description="auto, or a whole number from 1 to 99")]
Texts = tuple[str, ...]

MODERATION_CATEGORIES = (
    *("harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm"),
    *("self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic"),
)
MODERATION_PROMPT = (
    "Which of these categories does the text below fall into? {categories}.\n"
    "Answer with the names of those that apply, separated by commas, or with none.\n\nText:\n{text}"
)


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _folder(variable: str, fallback: str, help: str) -> Any:
    def default() -> Path:
        return Path(os.environ.get(variable) or Path.home() / fallback) / "loradock"

    return field(default_factory=default, metadata={"help": help})


def _engine() -> Any:
    return field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Base:
    """One base model of this server: what is loaded, under which name, with which of vLLM's options."""

    name: str
    model: str
    engine: Mapping[str, Any] = _engine()


@dataclass(frozen=True, slots=True)
class Config:
    """What this server was asked to be. `engine` holds vLLM's options as they were given, by vLLM's names."""

    model: str = _setting("smollm2", "a directory, a GGUF file, a hub id, an export of `loradock optimize`, or smollm2")
    name: str = _setting("", "the base model's public name (default: the last part of MODEL)")
    host: str = _setting("127.0.0.1", "address to listen on; any but loopback needs keys")
    port: Port = _setting(8000, "port to listen on")
    data_dir: Path = _folder("XDG_DATA_HOME", ".local/share", "where adapters and the registry live")
    cache_dir: Path = _folder("XDG_CACHE_HOME", ".cache", "where the embedded model is kept")
    registry: str = _setting("", "database URL of the registry (default: SQLite in data_dir)")
    registry_stale_seconds: Seconds = _setting(
        0.0,
        "seconds without the registry of several servers after which this one answers nobody, as others may have "
        "changed what it knows (0: it goes on)",
    )
    blobs: str = _setting("", "folder by URL where all servers of one registry keep adapters, as s3://bucket/prefix")
    api_keys: Texts = _setting((), "keys that may ask for answers (or their sha256:HEX)")
    admin_keys: Texts = _setting((), "keys that may also change adapters (or their sha256:HEX)")
    metrics_keys: Texts = _setting((), "keys that may read /metrics and nothing else (or their sha256:HEX)")
    oidc_issuer: str = _setting("", "issuer of OpenID Connect tokens that are taken beside keys (docs/tenants.md)")
    oidc_audience: Texts = _setting((), "audiences of such tokens, one of which they must have")
    oidc_jwks: str = _setting("", "address of the issuer's keys (default: the issuer says where they are)")
    oidc_algorithms: Texts = _setting(("RS256", "ES256"), "how such tokens may be signed")
    oidc_tenant_claim: str = _setting("tenant", "the claim that says the tenant")
    oidc_tenants: Texts = _setting(
        (), "what its values mean, as VALUE=TENANT (*: any; default: the value is the tenant)"
    )
    oidc_scope_claim: str = _setting("scope", "the claim that says the scopes")
    oidc_scopes: Texts = _setting(
        (), "what its values mean, as staff=inference,staff=adapters:write (default: the value is a scope)"
    )
    oidc_leeway: Seconds = _setting(30.0, "seconds by which the issuer's clock and this one may differ")
    oidc_limits: Texts = _setting((), "limits of each subject, as requests_per_minute=600")
    open_gateway_metrics: bool = _setting(
        False, "whether /metrics/gateway needs no key: endpoint pickers send none. It names every tenant's adapters"
    )
    max_upload_bytes: int = _setting(1 << 30, "largest adapter upload, as 512MiB or in bytes")
    probe: bool = _setting(True, "whether an upload must change what the base says")
    probe_min_effect: FromZero = _setting(0.08, "how far it must move the log-probabilities, in nats on average")
    probe_max_perplexity: FromZero = _setting(0.0, "how many times the base's perplexity it may have (0: any)")
    conversion_error: Portion = _setting(
        0.05,
        "what may be left out where an adapter of another kind (LoHa, LoKr, VeRA) is made a LoRA, in relative norm",
    )
    lora_kernels: Literal["auto", "layers", "compile", "off"] = _setting(
        "auto", "on a CPU: auto, layers, compile (torch.compile too), or off for vLLM's own path"
    )
    cpu_weights: Literal["auto", "int8", "int4"] = _setting(
        "auto", "on a CPU: auto (as in the checkpoint), or int8 or int4 for bfloat16 ones: faster, rounded"
    )
    speculation: Literal["off", "ngram"] = _setting(
        "off", "on a CPU: off, or ngram for drafts from a request's own prompt and answer, verified in the fused step"
    )
    target_inter_token: AutoOrSeconds = _setting(
        "auto",
        "on a CPU: what a step may take for prompts while answers wait for their next token:"
        " auto (some 2.8 times what it takes without), or seconds (0: any)",
    )
    coalesce_ms: FromZero = _setting(
        0.0,
        "milliseconds that tokens of a stream, but the first, may wait to go out together (0: each at once)",
    )
    front_ends: AutoOrCount = _setting(
        "1",
        "processes that send tokens to clients, the server among them: auto (2 beside a GPU with 4 cores or more), or "
        "how many",
    )
    vllm_patches: Texts = _setting(
        ("all",),
        "what loradock changes in vLLM: all, or correctness (and security, nothing for speed); no-NAME leaves one out",
    )
    max_adapter_rank: int = _setting(0, "largest rank of an upload (0: the engine's max_lora_rank)")
    allowed_target_modules: Texts = _setting((), "modules that uploads may adapt, as q_proj,v_proj")
    allowed_licenses: Texts = _setting((), "licenses of uploads, as apache-2.0,mit, from their README.md")
    allowed_digests: Texts = _setting((), "digests of the uploads that were approved, and no others")
    max_labelled_versions: int = _setting(100, "adapter versions that have metrics of their own; the rest are `other`")
    max_shadows: int = _setting(2, "shadow answers at a time; further ones are dropped and counted")
    source_roots: Texts = _setting((), "folders that a push by tenant default may name as file:///... or load by path")
    source_hosts: Texts = _setting(
        (), "hosts that a push by tenant default may name as https://HOST[:PORT]/... or oci://HOST/..."
    )
    resolver_folder: str = _setting(
        "",
        "folder of adapters by name: a request of tenant default for an unknown one takes it from there, as vLLM does",
    )
    keep_unloaded: WholeFromZero = _setting(
        16, "names of a tenant that stay after they were loaded by path and unloaded; older ones are removed"
    )
    grace_period: Seconds = _setting(30.0, "seconds that running answers get to finish when the server stops")
    max_wait: Seconds = _setting(
        30.0, "seconds that a request may wait in the queue; one that would wait longer gets a 429"
    )
    max_sequences: FromOne = _setting(256, "answers in one request: n times its prompts; a key may have its own limit")
    max_prompt_logprobs: FromOne = _setting(20, "alternatives for each prompt token; a key may have its own limit")
    max_batch: FromOne = _setting(2048, "inputs in one request for embeddings or scores; a key may have its own limit")
    changes_per_minute: FromOne = _setting(
        600, "changes a minute of a key beside inference (an admin's has no limit); a key may have its own limit"
    )
    reads_per_minute: FromOne = _setting(
        6000, "reads a minute of a key, lists and metrics; a key may have its own limit"
    )
    batch_concurrency: WholeFromZero = _setting(
        0, "lines of batches that an engine answers at once while no client waits (0: 4, on a GPU 64)"
    )
    batch_lines: FromOne = _setting(50_000, "requests in one batch")
    batch_open: FromOne = _setting(16, "batches of a tenant that are under way at a time")
    batch_hours: FromOne = _setting(24, "hours that a batch may take at most; what is not answered by then expires")
    batch_file_bytes: FromOne = _setting(200 << 20, "largest file of requests, as 200MiB or in bytes")
    batch_file_days: FromOne = _setting(30, "days for which files of batches are kept")
    batch_tenant_files: FromOne = _setting(1000, "files that a tenant may keep, answers too")
    batch_tenant_bytes: FromOne = _setting(5 << 30, "bytes of files that a tenant may keep, answers too")
    tenant_bytes: WholeFromZero = _setting(
        0,
        "bytes that a tenant may have on this server's disk beside its versions: uploads, files, answers, training, "
        "captured requests (0: 16 GiB more than batch_tenant_bytes)",
    )
    finetune_open: WholeFromZero = _setting(
        4, "fine-tuning jobs of a tenant that are not at their end (0: none, this server trains nothing)"
    )
    finetune_on: Literal["here", "workers", "any"] = _setting(
        "here", "which machines train fine-tuning jobs: here, workers (`loradock finetune worker`), or any of both"
    )
    finetune_hours: FromZero = _setting(24.0, "hours that a fine-tuning job may train")
    finetune_load: WholeFromZero = _setting(
        8, "requests of clients, running and waiting, above which the training of a fine-tuning job is suspended"
    )
    loop: bool = _setting(True, "whether this server drives adapters' loops, where a policy has one (docs/loop.md)")
    moderation_model: str = _setting(
        "", "the model or adapter that answers /v1/moderations, unless a request names one"
    )
    moderation_prompt: str = _setting(MODERATION_PROMPT, "what it is asked; {text} and {categories} stand for those")
    moderation_categories: Texts = _setting(MODERATION_CATEGORIES, "the categories that it tells apart")
    client_timeout: Seconds = _setting(60.0, "seconds that the server waits for a client that neither sends nor reads")
    hang_timeout: Seconds = _setting(
        300.0, "seconds without a step, while requests wait, after which an engine is dead"
    )
    restart_wait: Seconds = _setting(60.0, "seconds that a request waits for an engine that restarts")
    max_restarts: int = _setting(5, "restarts of an engine within restart_window; after one more death it stays down")
    restart_window: Seconds = _setting(600.0, "seconds for which an engine's death counts")
    drain_timeout: Seconds = _setting(600.0, "seconds that answers of a replaced engine get to finish")
    swap_tolerance: FromZero = _setting(0.5, "part of an adapter's effect that a swap of its base may lose or change")
    ssl_certfile: str = _setting("", "TLS certificate file")
    ssl_keyfile: str = _setting("", "TLS key file")
    drift: bool = _setting(True, "whether adapter versions are watched for drift")
    drift_threshold: float = _setting(1e5, "mean number of requests between two false alarms of one signal, at least")
    drift_reference: int = _setting(1000, "first requests of a version that later ones are compared with")
    drift_interval: float = _setting(600.0, "seconds in which one conversation counts once")
    drift_logprobs: Portion = _setting(
        0.05, "share of the requests whose log-probabilities are read; clients do not see them"
    )
    drift_probe_interval: float = _setting(3600.0, "seconds between two probes of a version (0: only when it loads)")
    drift_versions: int = _setting(200, "adapter versions that are watched at a time; others wait on the disk")
    golden_interval: Seconds = _setting(
        86_400.0, "seconds between two runs of an adapter's golden set (0: only for a version that is new)"
    )
    capture: bool = _setting(False, "whether drift reports may quote requests")
    capture_text: bool = _setting(False, "whether requests are kept as text in the data directory, to calibrate on")
    capture_redact: Texts = _setting((), "regular expressions that are blacked out in what is captured")
    capture_hours: float = _setting(24.0, "hours until a captured request is forgotten")
    webhooks: Texts = _setting((), "URLs that are told of drift alarms, verdicts and rollbacks, signed")
    webhook_secret: str = _setting("", "what webhooks are signed with: 16 characters or more, or whsec_BASE64")
    webhook_secret_file: str = _setting("", "a file that holds webhook_secret")
    webhook_private: bool = _setting(False, "whether webhooks may lead to private addresses")
    grafana_url: str = _setting("", "where Grafana has loradock's dashboards: /dashboard links to its panels")
    policies: tuple[Policy, ...] = _setting(
        DEFAULT_POLICIES, "what to do about canaries, by adapter (docs/drift.md), and its loop (docs/loop.md)"
    )
    data_quality: bool = _setting(True, "whether languages, empty prompts and refusals are counted by adapter")
    personal_data: Texts = _setting(
        PERSONAL_DATA, "personal data counted in requests: email, phone, iban, credit_card (none: empty)"
    )
    audit_bytes: WholeFromZero = _setting(
        64 << 20,
        "size at which audit.jsonl is rotated, as 64MiB or in bytes; also with the month (0: never)",
    )
    audit_days: FromOne = _setting(400, "days for which rotated files of the audit log are kept")
    history_rows: FromOne = _setting(10_000, "changes that an adapter's history holds; older ones go to history.jsonl")
    prices: tuple[Price, ...] = _setting((), "prices of tokens and engine time, by adapter (docs/monitoring.md)")
    currency: str = _setting("EUR", "the currency of the prices")
    usage_days: FromOne = _setting(400, "days for which usage by tenant and adapter is kept")
    slos: tuple[Slo, ...] = _setting(DEFAULT_SLOS, "service level objectives, by adapter (docs/monitoring.md)")
    ray: bool = _setting(False, "serve with replicas on a Ray cluster, which is started here unless ray_address is set")
    ray_address: str = _setting("", "a Ray cluster that runs already: auto, or HOST:PORT of its head")
    replicas: int = _setting(1, "with ray: servers of the same models, each with engines of its own")
    max_replicas: int = _setting(0, "with ray: most replicas under load (0: no more than replicas)")
    target_queue: float = _setting(16.0, "with ray: requests per replica, running and waiting, that scaling aims at")
    target_first_token: float = _setting(0.0, "with ray: seconds to the first token above which one is added (0: any)")
    fleet: Literal["auto", "homes", "off"] = _setting(
        "auto",
        "whether servers of one registry send requests on to the homes of their adapters: homes, off, or auto (where "
        "fleet_address is set)",
    )
    fleet_address: str = _setting("", "where other servers of the registry reach this one, as http://10.0.0.7:8000")
    otel_tenant: Literal["name", "hash", "none"] = _setting(
        "name", "how OpenTelemetry's spans name tenants: name, hash, or none (docs/tracing.md)"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "debug, info, warning or error")
    engine: Mapping[str, Any] = _engine()
    engines: tuple[Base, ...] = ()
    # From OpenTelemetry's own variables.
    otel: TracingSettings = TracingSettings()

    @property
    def open(self) -> bool:
        """Nobody was given a key, so everybody on this machine may do everything."""
        return not (self.api_keys or self.admin_keys or self.metrics_keys or self.oidc_issuer)

    @property
    def bases(self) -> tuple[Base, ...]:
        """Every base model, the one that answers requests without a model first."""
        return (Base(self.name, self.model, self.engine), *self.engines)

    @property
    def own_address(self) -> str:
        """Where other servers of the registry send requests of adapters that are at home here; "" for no homes."""
        if self.fleet == "off" or not self.registry:
            return ""
        if self.fleet_address or self.fleet == "auto":
            return self.fleet_address
        scheme = "https" if self.ssl_certfile else "http"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}"

    @property
    def registry_url(self) -> str:
        return self.registry or f"sqlite:///{self.data_dir / 'registry.sqlite'}"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as it is explained to people: `type` says what it takes, in words."""

    name: str
    kind: Any
    default: Any
    help: str

    @property
    def type(self) -> str:
        return takes(self.kind)


def settings() -> list[Setting]:
    """Every setting of ours, in the order in which they are explained."""
    return list(SETTINGS.values())


def _default(item: Any) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


SETTINGS = {
    item.name: Setting(item.name, item.type, _default(item), item.metadata["help"])
    for item in fields(Config)
    if "help" in item.metadata
}


def settings_help(*, every: bool = False) -> str:
    """Settings of ours on a line each, for `--help`: the most used, or every one by its group."""
    paragraphs = []
    for title in GROUPS if every else (COMMON,):
        rows = [f"{title}:"]
        for setting in settings():
            if group_of(setting.name) == title:
                plain = isinstance(setting.default, bool | int | float | str) and setting.default != ""
                default = f" (default: {setting.default})" if plain else ""
                rows.append(f"  --{setting.name.replace('_', '-'):<24} {setting.help}{default}")
        paragraphs.append("\n".join(rows))
    return "\n\n".join(f"\b\n{paragraph}" for paragraph in paragraphs)
