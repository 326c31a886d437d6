"""Mathematics of sequential tests: bets, confidence at any time, forecasts of a proof.

No traffic, no versions, no files: numbers in, numbers out.
"""
