"""A recipe from plan to published folder: plan, run, worker, gate, manifest, report.

It orders the steps; what a step does lives in `optimize.steps`.
"""
