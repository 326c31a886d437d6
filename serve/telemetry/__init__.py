"""What is counted and kept about answers: Prometheus metrics, SLOs, feedback, captured text, dashboards, rules.

It only observes; it uses neither `serve.drift` nor `serve.vllm_backend`.
"""
