"""The life of a version: push, canary, shadow, traffic split, promotion, rollback, removal, registry sync.

Every change to what is live is made here. No HTTP lives here.
"""
