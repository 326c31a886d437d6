"""Has what a version is asked, or answers, changed? Features, detectors, baselines and scheduled probes.

It raises alarms and acts on none; it uses neither `serve.telemetry` nor `serve.vllm_backend`.
"""
