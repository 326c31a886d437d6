"""What is counted and kept of answers: Prometheus metrics, SLOs, feedback, captured text, dashboards and rules.

It only listens; it uses neither `serve.drift` nor `serve.vllm_backend`.
"""
