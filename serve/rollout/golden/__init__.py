"""Golden sets: cases with known answers, their runs, scores and verdicts.

Comparisons of scores are `serve.sequential`; what follows a verdict is decided by the controller.
"""
