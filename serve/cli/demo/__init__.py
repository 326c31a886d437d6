"""`loradock demo`: a server, traffic, a good and a bad version of one adapter, and what the server makes of them.

The adapters beside this file are trained by `good.yaml` and `bad.yaml` on the texts of `texts.py`; both are ours.
"""
