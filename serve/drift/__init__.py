"""Detects that what a version is asked, or what it answers, has changed: features, detectors, baselines, probes.

It raises alarms and acts on none; it uses neither `serve.telemetry` nor `serve.vllm_backend`.
"""
