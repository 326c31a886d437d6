"""Two versions under the same traffic: the split, who asks, canaries and shadows, and what differs.

It reports verdicts; the controller acts on them.
"""
