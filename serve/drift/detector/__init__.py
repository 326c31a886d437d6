"""Sequential detectors over rows of numbers: bets, bags of scores, mean rows, directions, sizes of effects.

It sees rows alone; what they say of a request is `serve.drift.features`.
"""
