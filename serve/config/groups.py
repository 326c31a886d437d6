"""How help and documentation group the settings."""

from __future__ import annotations

COMMON = "Most used"

# Each setting stands in one group; those of the first are what `loradock serve --help` shows.
GROUPS: dict[str, tuple[str, ...]] = {
    COMMON: (
        *("model", "name", "host", "port", "data_dir", "api_keys", "admin_keys"),
        *("cpu_weights", "speculation", "drift", "loop", "policies", "log_level"),
    ),
    "Storage": (
        *("cache_dir", "registry", "registry_stale_seconds", "blobs", "tenant_bytes"),
        *("history_rows", "audit_bytes", "audit_days"),
    ),
    "Who may ask, and how": (
        *("metrics_keys", "open_gateway_metrics", "ssl_certfile", "ssl_keyfile"),
        *("max_wait", "max_sequences", "max_prompt_logprobs", "max_batch", "client_timeout"),
        *("changes_per_minute", "reads_per_minute"),
        *("oidc_issuer", "oidc_audience", "oidc_jwks", "oidc_algorithms", "oidc_leeway", "oidc_limits"),
        *("oidc_scope_claim", "oidc_scopes", "oidc_tenant_claim", "oidc_tenants"),
    ),
    "Uploads of adapters": (
        *("max_upload_bytes", "probe", "probe_min_effect", "probe_max_perplexity", "max_adapter_rank"),
        "conversion_error",
        *("allowed_target_modules", "allowed_licenses", "allowed_digests"),
        *("source_roots", "source_hosts", "resolver_folder", "keep_unloaded"),
    ),
    "Engine": (
        *("lora_kernels", "target_inter_token", "grace_period", "hang_timeout", "restart_wait", "max_restarts"),
        *("restart_window", "drain_timeout", "swap_tolerance", "vllm_patches", "coalesce_ms"),
        "front_ends",
    ),
    "Drift, canaries, golden sets": (
        *("drift_threshold", "drift_reference", "drift_interval", "drift_logprobs", "drift_probe_interval"),
        *("drift_versions", "golden_interval", "max_shadows", "data_quality", "personal_data"),
    ),
    "Captured requests": ("capture", "capture_text", "capture_redact", "capture_hours"),
    "Batches": (
        *("batch_concurrency", "batch_lines", "batch_open", "batch_hours", "batch_file_bytes", "batch_file_days"),
        *("batch_tenant_files", "batch_tenant_bytes"),
    ),
    "Fine-tuning": ("finetune_open", "finetune_on", "finetune_hours", "finetune_load"),
    "Moderation": ("moderation_model", "moderation_prompt", "moderation_categories"),
    "Metrics, alerts, usage": (
        *("max_labelled_versions", "slos", "webhooks", "webhook_secret", "webhook_secret_file", "webhook_private"),
        *("grafana_url", "prices", "currency", "usage_days", "otel_tenant"),
    ),
    "Replicas": (
        *("fleet", "fleet_address", "ray", "ray_address", "replicas", "max_replicas", "target_queue"),
        "target_first_token",
    ),
}


def group_of(name: str) -> str:
    """The title of a setting's group; one that no group names yet stands with the most used."""
    return next((title for title, names in GROUPS.items() if name in names), COMMON)
